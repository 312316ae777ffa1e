"""Checkpoint files under kills, full disks and damage, and the choice of the one to go on from."""

import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import test_cli
import torch
import yaml
from conftest import TEST_PATHS
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from test_cli import Write, refused, rows_of

from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO, read_checkpoint
from xpo_lightning.checkpointing.resume import Place, newest_checkpoint
from xpo_lightning.cli.lightning_cli import XPOCLI, main
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.owner import this_process

write_config, prompts_file = test_cli.write_config, test_cli.prompts_file
GONE = replace(this_process(), started=1)
"""A process that had the number of this one."""
CSV_LOGGER, TENSORBOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
EVERY_STEP = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
}


def checkpoint_of(value: float, numbers: int = 8, step: int = 0) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((numbers,), value)}, "global_step": step, "optimizer_states": []}


def value_in(path: Path) -> float:
    (value,) = read_checkpoint(path)["state_dict"]["weight"].unique().tolist()
    return value


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(_: bytes) -> bytes:
    return b""


def flip(data: bytes, place: int | None = None) -> bytes:
    place = len(data) // 2 if place is None else place
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


# ---- writing ----


class Raises:
    """Fails while it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("extra", "size", "error", "message"),
    [
        (None, 1_000_000, InputError, "last.ckpt' could not be written: File too large; .* intact"),
        (None, 0, InputError, "File too large"),
        (None, 3_999_999, InputError, "File too large"),
        (Raises(TypeError("cannot be pickled")), -1, TypeError, "cannot be pickled"),
        (Raises(KeyboardInterrupt()), -1, KeyboardInterrupt, ""),
    ],
)
def test_save_that_fails_leaves_the_file_of_before_and_no_part(
    tmp_path: Path, extra: Any, size: int, error: type[BaseException], message: str
):
    """The new file would take 4,000,000 bytes and some more."""
    target = tmp_path / "last.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), target)
    before = target.read_bytes()
    with file_size_limit(size), pytest.raises(error, match=message):
        CrashSafeCheckpointIO().save_checkpoint({**checkpoint_of(2.0, 1_000_000), "extra": extra}, target)
    assert target.read_bytes() == before
    assert names_in(tmp_path) == ["last.ckpt"]
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(2.0, 1_000_000), target)
    assert value_in(target) == 2.0


def test_save_into_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"'.*/file/last.ckpt' could not be written: File exists"):
        CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), tmp_path / "file" / "last.ckpt")


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import yaml
from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO, read_checkpoint

def checkpoint(value):
    return {"state_dict": {str(n): torch.full((300_000,), float(value)) for n in range(4)}}

torch.set_num_threads(1)
target = Path(sys.argv[1])
CrashSafeCheckpointIO().save_checkpoint(checkpoint(0), target)
random.seed(0)
parts = 0
for number in range(15):
    child = os.fork()
    if child == 0:
        value = 1
        while True:
            CrashSafeCheckpointIO().save_checkpoint(checkpoint(value), target)
            value += 1
    time.sleep(random.uniform(0.01, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    parts += bool(list(target.parent.glob(".last.ckpt.*.part")))
    state = read_checkpoint(target)["state_dict"]
    assert len({float(value) for tensor in state.values() for value in (tensor.min(), tensor.max())}) == 1
CrashSafeCheckpointIO().save_checkpoint(checkpoint(1), target)
assert os.listdir(target.parent) == ["last.ckpt"]
print(parts)
"""


@pytest.mark.slow
def test_checkpoint_when_the_process_is_killed_while_saving_then_is_whole(tmp_path: Path):
    """Temporary files are on another file system, from which a move would be a copy."""
    target = tmp_path / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(target)]
    environment = {**os.environ, "TMPDIR": "/dev/shm"}  # noqa: S108
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5, "the kills hit no save"


def test_parts_of_killed_processes_are_removed_at_the_first_save(tmp_path: Path):
    """Those of a process that runs stay, as do those of another machine that were written just now."""
    gone, here = GONE, this_process()
    elsewhere = replace(here, host="elsewhere")
    kept = [f".d.ckpt.{here}.part", f".b.ckpt.{elsewhere}.part", f".c.other.{gone}.part"]
    old = [f".a.ckpt.{elsewhere}.part", ".last.ckpt.part"]
    for name in (*kept, *old, f".last.ckpt.{gone}.part", f".step=3.ckpt.{gone}.part"):
        (tmp_path / name).write_text("half")
    for name in old:
        os.utime(tmp_path / name, (0, 0))
    plugin = CrashSafeCheckpointIO()
    plugin.save_checkpoint(checkpoint_of(1.0), tmp_path / "a.ckpt")
    assert names_in(tmp_path) == sorted([*kept, "a.ckpt"])


SAVING = """
import collections, sys
import xpo_lightning.checkpointing.io as room

class Slow:
    def __reduce__(self):
        print("saving", flush=True)
        sys.stdin.readline()
        return collections.OrderedDict, ()

room.CrashSafeCheckpointIO().save_checkpoint({"state_dict": {}, "slow": Slow()}, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_runs_beside_each_other_leave_each_others_saves_alone(write_config: Write, tmp_path: Path):
    """One is in the middle of a save while another looks for what to go on from, and saves."""
    config, folder = write_config(data__validation_size=0), tmp_path / "runs/version_0/checkpoints"
    main(["fit", "--config", config])
    command = [sys.executable, "-c", SAVING, str(folder / "last.ckpt")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "saving\n"
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), folder / "last.ckpt")
    other.stdin.write("\n")
    other.stdin.close()
    assert other.wait() == 0
    assert read_checkpoint(folder / "last.ckpt")["slow"] == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path, bad: float, dtype: torch.dtype):
    target = tmp_path / "last.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), target)
    before = target.read_bytes()
    weight = torch.zeros(3, 5, dtype=dtype)
    weight[2, 1] = bad
    state = {"fine": torch.ones(2), "none": torch.ones(0), "count": torch.tensor(3), "policy.weight": weight}
    with pytest.raises(InputError, match=r"'policy.weight' holds nan or inf") as refusal:
        CrashSafeCheckpointIO().save_checkpoint({"state_dict": state}, target)
    assert str(target) in str(refusal.value)
    assert target.read_bytes() == before
    weight[2, 1] = 1
    CrashSafeCheckpointIO().save_checkpoint({"state_dict": state}, target)
    assert torch.equal(CrashSafeCheckpointIO().load_checkpoint(target)["state_dict"]["policy.weight"], weight)


@pytest.mark.slow
def test_disk_that_is_full_ends_the_run_with_one_line_and_the_last_checkpoint_stays(
    write_config: Write, tmp_path: Path
):
    config = write_config(data__validation_size=0, data__batch_size=4)
    main(["fit", "--config", config])
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    (good,) = folder.glob("*.ckpt")
    before = good.read_bytes()
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    done = subprocess.run(
        [*command, "--ckpt_path", "last", "--trainer.max_epochs", "2"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": TEST_PATHS},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"xpo: error: checkpoint '{folder}/epoch=1-step=4.ckpt' could not be"
    )
    assert "File too large" in done.stderr
    assert "terminate" not in done.stderr
    assert good.read_bytes() == before
    assert names_in(folder) == [good.name]


# ---- reading ----


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path):
    target, damaged = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.5), target)
    whole, faults = target.read_bytes(), []
    for place in range(0, len(whole), 3):
        damaged.write_bytes(flip(whole, place))
        try:
            value = value_in(damaged)
        except InputError as error:
            faults.append(str(error))
        else:
            assert value == 1.5
    assert all(str(damaged) in fault for fault in faults)
    assert len(faults) > len(whole) / 12  # The rest is names that are given twice, times, and padding.


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def write_evil(path: Path, marker: Path, kind: str) -> None:
    content = {**checkpoint_of(1.0), "evil": Evil(marker)}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Evil(marker)))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_file_that_would_run_code_is_refused_and_runs_none(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    evil, marker = folder / "evil.ckpt", tmp_path / "marker"
    write_evil(evil, marker, kind)
    with pytest.raises(InputError, match=rf"'{evil}' .*{'could run code' if kind == 'zip' else 'damaged'}"):
        CrashSafeCheckpointIO().load_checkpoint(evil)
    for given in (str(evil), "last") if kind == "zip" else ():
        assert f"'{evil}' holds " in refused(capsys, "fit", "--config", write_config(), "--ckpt_path", given)
    assert not marker.exists()
    torch.load(evil, weights_only=False) if kind != "pickle" else pickle.loads(evil.read_bytes())  # noqa: S301
    assert marker.exists(), "the file is as bad as it should be"


def test_code_is_never_loaded_when_asked_for_nor_from_the_web(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="weights_only=false"):
        CrashSafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(InputError, match="web address"):
        CrashSafeCheckpointIO().load_checkpoint("https://example.org/a.ckpt")
    config = write_config()
    assert "weights_only=false" in refused(capsys, "fit", "--config", config, "--weights_only", "false")
    line = refused(capsys, "predict", "--config", config, "--ckpt_path", "http://example.org/a.ckpt")
    assert "download it" in line


@pytest.mark.parametrize(("damage", "reason"), [(cut, ""), (empty, "it is empty"), (flip, "checksum")])
def test_damaged_file_is_refused_with_advice(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str):
    file = tmp_path / "a.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0, 10_000), file)
    file.write_bytes(damage(file.read_bytes()))
    expected = rf"ckpt_path: '{file}' is no checkpoint, or a damaged one \(.*{reason}.*`--ckpt_path last`"
    with pytest.raises(InputError, match=expected):
        CrashSafeCheckpointIO().load_checkpoint(file)


def test_damaged_file_that_is_given_is_refused_before_a_model_is_loaded(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "xpo_lightning.models.policy.ModelSpec.load_model", lambda self: pytest.fail("a model was loaded")
    )
    file = tmp_path / "a.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0, 10_000), file)
    file.write_bytes(flip(file.read_bytes()))
    line = refused(capsys, "fit", "--config", write_config(), "--ckpt_path", str(file))
    assert f"ckpt_path: '{file}' is no checkpoint, or a damaged one" in line


# ---- the choice of a checkpoint ----


def test_last_passes_over_damaged_files_and_names_them(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(data__validation_size=0, trainer__callbacks=[EVERY_STEP])
    main(["fit", "--config", config])
    folder = tmp_path / "runs/version_0/checkpoints"
    good, *bad = (folder / f"epoch=0-step={step}.ckpt" for step in (1, 2, 3, 4))
    for file, damage in zip(bad, (cut, empty, flip), strict=True):
        file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    main(["fit", "--config", config, "--ckpt_path", "last"])
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xpo: ")]
    for line, file in zip(shown[:3], reversed(bad), strict=True):
        assert line.startswith(f"xpo: passed over: '{file}' is no checkpoint, or a damaged one")
    assert shown[3:] == [f"xpo: the newest checkpoint is '{good}', of step 1"]
    steps = [row["step"] for row in rows_of(tmp_path / "runs/version_0/metrics.csv") if "loss/dpo" in row]
    assert steps == [1, 2, 3, 4], "the rows of the lost steps are written anew, and once"
    for file in folder.glob("*.ckpt"):
        file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", config, "--ckpt_path", "last"])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xpo: ")]
    assert lines[-1].startswith("xpo: error: ckpt_path: no checkpoint can be used")
    assert all(sum(f"'{file}'" in line for line in lines) == 1 for file in folder.glob("*.ckpt"))


def test_newest_is_told_by_time_and_then_by_name_and_on_every_process_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    files = [tmp_path / f"version_{n}" / "checkpoints" / f"{name}.ckpt" for n in (0, 1) for name in "ab"]
    for time, file in zip([3, 7, 7, 5], files, strict=True):
        CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), file)
        os.utime(file, (time, time))
    bad = tmp_path / "version_10" / "checkpoints" / "a.ckpt"
    CrashSafeCheckpointIO().save_checkpoint(checkpoint_of(1.0), bad)
    bad.write_bytes(cut(bad.read_bytes()))
    for rank, warned in ((0, 1), (1, 0)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        point = newest_checkpoint("fit", [Place(str(tmp_path), "version_*/checkpoints")])
        assert point is not None
        assert point.path == files[1]
        assert capsys.readouterr().err.count(str(bad)) == warned


@pytest.mark.parametrize(
    ("logger", "place"),
    [
        ({"class_path": CSV_LOGGER, "init_args": {"save_dir": "runs", "version": "mine"}}, "runs/lightning_logs/mine"),
        (None, "runs/version_0"),
        (False, "runs"),
        (
            [
                {"class_path": TENSORBOARD, "init_args": {"save_dir": "board", "name": "x"}},
                {"class_path": CSV_LOGGER, "init_args": {"save_dir": "rows", "name": "x"}},
            ],
            "board/x/version_0",
        ),
    ],
)
def test_last_goes_on_in_the_folder_where_the_run_was(
    write_config: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    logger: Any,
    place: str,
):
    monkeypatch.chdir(tmp_path)
    config = write_config(trainer__logger=logger, trainer__default_root_dir="runs")
    main(["fit", "--config", config])
    checkpoints = Path(place, "checkpoints")
    assert names_in(checkpoints) == ["epoch=0-step=2.ckpt"]
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(exists and is not empty|dirpath has changed).*")
        main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert f"{checkpoints}/epoch=0-step=2.ckpt', of step 2" in capsys.readouterr().err
    assert names_in(checkpoints) == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    assert len([*tmp_path.rglob("*.ckpt")]) == 2
    metrics = [*tmp_path.rglob("metrics.csv")]
    assert len(metrics) == (0 if logger is False else 1)
    for file in metrics:
        assert [row["step"] for row in rows_of(file) if "loss/dpo" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in rows_of(file) if "eval/win_rate" in row] == [2, 4]


def test_last_looks_where_checkpoints_are_told_to_be(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    callback = {**EVERY_STEP, "init_args": {**EVERY_STEP["init_args"], "dirpath": str(tmp_path / "kept")}}
    config = write_config(data__validation_size=0, data__batch_size=4, trainer__callbacks=[callback])
    main(["fit", "--config", config])
    capsys.readouterr()
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert f"'{tmp_path / 'kept' / 'epoch=0-step=2.ckpt'}', of step 2" in capsys.readouterr().err
    assert names_in(tmp_path / "kept")[-1] == "epoch=1-step=4.ckpt"


def test_file_that_is_given_starts_a_new_folder(write_config: Write, tmp_path: Path):
    config = write_config(data__validation_size=0, data__batch_size=4)
    main(["fit", "--config", config])
    file = tmp_path / "runs/version_0/checkpoints/epoch=0-step=2.ckpt"
    main(["fit", "--config", config, "--ckpt_path", str(file), "--trainer.max_epochs", "2"])
    assert names_in(file.parent) == [file.name]
    assert names_in(tmp_path / "runs/version_1/checkpoints") == ["epoch=1-step=4.ckpt"]
    assert [row["step"] for row in rows_of(tmp_path / "runs/version_1/metrics.csv") if "loss/dpo" in row] == [3, 4]


def test_run_without_a_checkpoint_yet_starts_from_its_beginning_and_nothing_else_does(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(data__validation_size=0, data__batch_size=4)
    for verb in ("validate", "predict"):
        line = refused(capsys, verb, "--config", config, "--ckpt_path", "last")
        assert f"there is no checkpoint in '{tmp_path}/runs/version_*/checkpoints'" in line
    main(["fit", "--config", config, "--ckpt_path", "last"])
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xpo: ")]
    folder = f"'{tmp_path}/runs/version_*/checkpoints'"
    assert shown == [f"xpo: there is no checkpoint in {folder} yet, so the run starts from its beginning"]
    assert [row["step"] for row in rows_of(tmp_path / "runs/version_0/metrics.csv") if "loss/dpo" in row] == [1, 2]


def test_last_of_validate_is_the_trained_policy(write_config: Write, tmp_path: Path):
    config = write_config(model__learning_rate=0.03)
    main(["fit", "--config", config])
    parts = [tmp_path / f"runs/version_0/checkpoints/.last.ckpt.{one}.part" for one in (this_process(), GONE)]
    for part in parts:
        part.write_text("half")
    main(["validate", "--config", config, "--ckpt_path", "last"])
    (row,) = rows_of(tmp_path / "runs/version_0/validate/metrics.csv")
    assert abs(row["eval/objective/kl"]) > 1e-3
    assert [part.exists() for part in parts] == [True, False], "that of a process that is gone goes"


def test_checkpoint_of_weights_alone_is_validated_but_not_trained_on(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    callback = {**EVERY_STEP, "init_args": {**EVERY_STEP["init_args"], "save_weights_only": True}}
    config = write_config(trainer__callbacks=[callback])
    main(["fit", "--config", config])
    file = tmp_path / "runs/version_0/checkpoints/epoch=0-step=2.ckpt"
    for given in (str(file), "last"):
        assert "save_weights_only" in refused(capsys, "fit", "--config", config, "--ckpt_path", given)
    main(["validate", "--config", config, "--ckpt_path", "last"])
    (row,) = rows_of(tmp_path / "runs/version_0/validate/metrics.csv")
    assert row["eval/objective/kl"] != 0


@pytest.mark.slow
def test_words_without_a_meaning_here_are_refused_with_what_to_give_instead(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    callback = {**EVERY_STEP, "init_args": {"monitor": "lr", "mode": "max", "save_top_k": -1, "every_n_train_steps": 1}}
    config = write_config(trainer__callbacks=[callback], data__validation_size=0, data__batch_size=4)
    assert "there is no checkpoint in" in refused(capsys, "fit", "--config", config, "--ckpt_path", "best")
    main(["fit", "--config", config])
    best = tmp_path / "runs/version_0/checkpoints/epoch=0-step=1.ckpt"  # The learning rate falls.
    for verb in ("fit", "validate", "predict"):
        line = refused(capsys, verb, "--config", config, "--ckpt_path", "best")
        assert line.endswith(f"--ckpt_path {best}")
    assert "give the local file" in refused(capsys, "fit", "--config", config, "--ckpt_path", "registry:model")
    assert "hpc_ckpt_" in refused(capsys, "validate", "--config", config, "--ckpt_path", "hpc")


# ---- the command line ----


class OwnCheckpointIO(TorchCheckpointIO):
    """Lightning's, as a user's own."""


@pytest.mark.parametrize(
    ("verb", "plugins", "expected"),
    [
        ("fit", None, CrashSafeCheckpointIO),
        (
            "validate",
            [{"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}],
            CrashSafeCheckpointIO,
        ),
        ("predict", [{"class_path": f"{__name__}.OwnCheckpointIO"}], OwnCheckpointIO),
        ("validate", {"class_path": f"{__name__}.OwnCheckpointIO"}, OwnCheckpointIO),
    ],
)
def test_checkpoints_are_crash_safe_unless_the_config_has_its_own_way(
    write_config: Write, verb: str, plugins: Any, expected: type
):
    cli = XPOCLI([verb, "--config", write_config(trainer__plugins=plugins)])
    assert type(cli.trainer.strategy.checkpoint_io) is expected


@pytest.mark.slow
def test_settings_are_those_of_the_config_and_not_of_the_checkpoint(write_config: Write, tmp_path: Path):
    """Lightning's command line would take them from `hyper_parameters`, against the flags."""
    config = write_config(data__validation_size=0, data__batch_size=4)
    main(["fit", "--config", config])
    file = tmp_path / "runs/version_0/checkpoints/epoch=0-step=2.ckpt"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "hyper_parameters": {"beta": 7.0, "alpha": 7.0}}, file)
    for given, version in ((str(file), 1), ("last", 0)):
        main(["fit", "--config", config, "--ckpt_path", given, "--trainer.max_epochs", "2", "--model.beta", "0.25"])
        row = next(r for r in rows_of(tmp_path / f"runs/version_{version}/metrics.csv") if r["step"] == 3)
        assert row["beta"] == 0.25
        assert row["alpha"] == pytest.approx(1e-5)
        for newer in (tmp_path / "runs").rglob("*step=4.ckpt"):
            newer.unlink()


def test_changed_settings_of_a_resumed_run_are_told_and_the_former_config_is_kept(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(data__validation_size=0, data__batch_size=4)
    main(["fit", "--config", config])
    folder = tmp_path / "runs/version_0"
    former = (folder / "config.yaml").read_text()
    capsys.readouterr()
    changed = ["--trainer.max_epochs", "2", "--model.beta", "0.25"]
    main(["fit", "--config", config, "--ckpt_path", "last", *changed])
    text = "Resumed with other settings: model.beta 0.1 -> 0.25, trainer.max_epochs 1 -> 2"
    assert f"xpo: {text}\n" in capsys.readouterr().err
    assert (folder / "config.1.yaml").read_text() == former
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["beta"] == 0.25
    (event,) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    fields = {"model.beta": [0.1, 0.25], "trainer.max_epochs": [1, 2]}
    assert event == {"step": 2, "text": text, "changed": fields, "former_config": "config.1.yaml"}

    main(["fit", "--config", config, "--ckpt_path", "last", *changed, "--trainer.max_epochs", "2"])
    assert "Resumed with other" not in capsys.readouterr().err, "the same settings again"
    first = str(folder / "checkpoints/epoch=0-step=2.ckpt")
    main(["fit", "--config", config, "--ckpt_path", first, "--trainer.max_epochs", "2"])
    assert "Resumed with other settings: trainer.max_epochs 1 -> 2\n" in capsys.readouterr().err
    assert (tmp_path / "runs/version_1/events.jsonl").exists(), "a folder of its own has its own history"


def test_resume_that_is_refused_leaves_the_config_as_it_was(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(data__validation_size=0, data__batch_size=4)
    main(["fit", "--config", config])
    former = (tmp_path / "runs/version_0/config.yaml").read_text()
    line = refused(capsys, "fit", "--config", config, "--ckpt_path", "last", "--data.batch_size", "2")
    assert "the checkpoint's run had another" in line
    assert (tmp_path / "runs/version_0/config.yaml").read_text() == former


class Noting(DummyLogger):
    """A logger that keeps the hyper-parameters."""

    noted: ClassVar[dict[str, Any]] = {}

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:
        Noting.noted = params


def test_settings_reach_the_logger_and_the_checkpoint_by_their_keys(write_config: Write, tmp_path: Path):
    sizes = {"data__validation_size": 0, "data__batch_size": 4}
    logger = {"class_path": f"{__name__}.Noting"}
    main(["fit", "--config", write_config(**sizes, model__beta=0.25, trainer__logger=logger)])
    saved = torch.load(tmp_path / "runs/version_0/checkpoints/epoch=0-step=2.ckpt", weights_only=True)
    for settings in (saved["hyper_parameters"], Noting.noted):
        assert settings["model.beta"] == 0.25
        assert settings["data.batch_size"] == 4
        assert settings["model.reward.class_path"].endswith("Reward")
