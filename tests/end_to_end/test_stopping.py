"""A run that is asked to stop, or that an error ends: the checkpoint comes first, and nothing afterwards harms it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from lightning.pytorch import Callback
from test_cli import Write, letters, refused

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.owner import this_process

pytestmark = pytest.mark.timeout(120)
write_config, prompts_file = test_cli.write_config, test_cli.prompts_file
EVENTS: list[str] = []
ASKED: list[int] = []
"""How many completions each call of the reward had."""
STEP = ["", 0]


def stopping(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score, and stop the run in some way at some call."""
    how, left = STEP
    STEP[1] = int(left) - 1
    ASKED.append(len(completions))
    if STEP[1] == 0 and how in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, how))
    if STEP[1] == 0 and how == "error":
        raise RuntimeError("the reward is gone")
    return letters(prompts, completions, columns)


class Broken(Callback):
    """Fails as the run ends."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        EVENTS.append(f"{type(exception).__name__}, saved: {bool(list(Path(trainer.log_dir).rglob('*.ckpt')))}")
        raise ValueError("no such\nroom")


@pytest.fixture
def config(write_config: Write, tmp_path: Path) -> Iterator[str]:
    EVENTS.clear()
    ASKED.clear()
    files = {"LearningCurves": "curves.png", "RunReport": "report.html"}
    callbacks = [{"class_path": name, "init_args": {"file": str(tmp_path / file)}} for name, file in files.items()]
    yield write_config(
        data__validation_size=0,
        model__reward={"class_path": "PythonReward", "init_args": {"function": f"{__name__}.stopping"}},
        trainer__callbacks=[{"class_path": f"{__name__}.Broken"}, *callbacks],
    )
    STEP[:] = ["", 0]


def end(config: str, how: str, call: int, *options: str) -> Any:
    """Run until it is stopped at some call of the reward, and return what it ends with."""
    STEP[:] = [how, call]
    with pytest.raises(BaseException) as ended:  # noqa: PT011  (what it is, is what is tested)
        main(["fit", "--config", config, "--ckpt_path", "last", *options])
    return ended.value


@pytest.mark.parametrize(("how", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_checkpoint_is_saved_before_what_shows_and_failures_after_it_are_named(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, status: int
):
    for name in ("report.html", "curves.png"):
        (tmp_path / name).mkdir()
    ended = end(config, how, 3)
    assert isinstance(ended, SystemExit)
    assert ended.code == status
    assert EVENTS == ["StopAsked, saved: True"]
    shown = capsys.readouterr().out.splitlines()
    (saved,) = [line for line in shown if "Stopped at step 2; --ckpt_path last goes on from" in line]
    (failed,) = [line for line in shown if "Broken failed as the run ended: ValueError: no such room" in line]
    (report,) = [line for line in shown if line.startswith("No report: ")]
    (curves,) = [line for line in shown if line.startswith("No learning curves: ")]
    assert shown.index(saved) < min(map(shown.index, (failed, report, curves)))
    state = torch.load(tmp_path / "runs" / "version_0" / "checkpoints" / "stopped.ckpt", weights_only=True)
    assert state["global_step"] == 2


def test_error_that_has_changed_nothing_saves_what_there_was_and_stays_the_error(
    config: str, write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ended = end(config, "error", 4)
    assert "the reward is gone" in str(ended) or ended.code == 2
    checkpoints = tmp_path / "runs" / "version_0" / "checkpoints"
    assert [file.name for file in checkpoints.iterdir()] == ["stopped.ckpt"]
    assert "Broken failed as the run ended" in capsys.readouterr().out
    main(["fit", "--config", config, "--ckpt_path", "last"])
    whole = write_config(
        data__validation_size=0, trainer__default_root_dir=str(tmp_path / "whole"), trainer__logger=False
    )
    main(["fit", "--config", whole])
    (one,) = (torch.load(file, weights_only=True) for file in (tmp_path / "whole").rglob("*.ckpt"))
    other = torch.load(checkpoints / "step=4.ckpt", weights_only=True)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_error_after_a_weight_was_changed_saves_nothing(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second of a batch's steps fails: the weights are no longer those after the last finished batch."""
    calls = []

    def add_gradients(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return whole(*arguments)

    import xpo_lightning.module as room

    whole = room.add_gradients
    monkeypatch.setattr(room, "add_gradients", add_gradients)
    ended = end(config, "", 0, "--model.epochs_per_rollout", "2")
    assert "in the middle" in str(ended)
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


class Bug(Callback):
    """Fails in the first batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("an index is wrong")


class OutOfMemory(Callback):
    """Runs out of memory in the first batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("no room for another tensor")


@pytest.mark.slow
@pytest.mark.parametrize("error", [Bug, OutOfMemory])
def test_error_that_is_not_the_users_has_a_traceback_and_status_1(write_config: Write, error: type[Callback]):
    config = write_config(data__validation_size=0, trainer__callbacks=[{"class_path": f"{__name__}.{error.__name__}"}])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert re.search("RuntimeError: an index is wrong|OutOfMemoryError: no room", done.stderr)
    assert "xpo: error" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_step_that_breaks_off_leaves_nothing_in_the_cache(config: str, tmp_path: Path, kind: str):
    """Four batches of two prompts an epoch: both sides are scored in the first, the policy's alone in the second."""
    cache = ["--model.reference_cache", "memory" if kind == "memory" else str(tmp_path / "cache")]
    end(config, "SIGTERM", 3, *cache)
    assert ASKED == [4, 4, 4], "the signal comes while the third batch is scored"
    ASKED.clear()
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2", *cache])
    assert ASKED == [4, 4, 2, 2, 2, 2]


def test_run_does_not_go_on_in_the_folder_of_one_that_is_at_work(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """But where that is gone, or on a machine that nobody here can look at."""
    config = write_config(data__validation_size=0)
    main(["fit", "--config", config])
    lock = tmp_path / "runs" / "version_0" / ".run.lock"
    assert not lock.exists()
    with subprocess.Popen(["sleep", "60"]) as other:
        status = Path(f"/proc/{other.pid}/stat").read_text()
        at_work = replace(this_process(), pid=other.pid, started=int(status.rpartition(")")[2].split()[19]))
        lock.write_text(str(at_work))
        before = (lock.parent / "metrics.csv").read_bytes()
        resume = ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
        line = refused(capsys, *resume)
        assert f"the run in '{lock.parent}' is still at work, as process {other.pid} on {at_work.host}" in line
        assert (lock.parent / "metrics.csv").read_bytes() == before
        lock.write_text(str(replace(at_work, host="elsewhere")))
        main(resume)
        assert not lock.exists()
        lock.write_text(str(at_work))
        other.kill()
        main([*resume[:-1], "3"])
    assert not lock.exists()
