"""Checkpoint files under kills, full disks and damage."""

import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from conftest import TEST_PATHS
from damage import GONE, checkpoint_of, cut, empty, file_size_limit, flip, names_in
from test_cli import Write, refused

from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO, read_checkpoint
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.owner import this_process

write_config, prompts_file = test_cli.write_config, test_cli.prompts_file


def value_in(path: Path) -> float:
    (value,) = read_checkpoint(path)["state_dict"]["weight"].unique().tolist()
    return value


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
