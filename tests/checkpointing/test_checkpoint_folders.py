"""Checkpoint folders of FSDP2: every byte is checked, none runs code, and only a whole folder replaces another."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from damage import GONE, file_size_limit, flip, names_in
from test_cli import Write, refused

from xpo_lightning import XPOLightningModule
from xpo_lightning.checkpointing.sharded_io import read_folder
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError

pytestmark = pytest.mark.timeout(120)
write_config, prompts_file = test_cli.write_config, test_cli.prompts_file
FOLDERS = {"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
NEWEST = "last.ckpt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder in which all tests work, so that they can share a run."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def tmp_path(place: Path) -> Path:
    """Empty that folder, apart from the copy of the run."""
    for path in place.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != "copy":
            shutil.rmtree(path)
    return place


@pytest.fixture
def config(write_config: Write) -> Iterator[str]:
    """Give the config of a run on one process whose weights are spread all the same; end what it begins."""
    every_step = {
        "class_path": "RunCheckpoint",
        "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True},
    }
    yield write_config(trainer__strategy=FOLDERS, trainer__callbacks=[every_step], trainer__num_sanity_val_steps=0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoints(config: str, tmp_path: Path) -> Path:
    """Give the folder of its checkpoints, of steps 1 and 2; it runs once, and later tests get a copy."""
    runs, copy = tmp_path / "runs", tmp_path / "copy"
    if not copy.exists():
        fit(config)
        shutil.copytree(runs, copy)
    else:
        shutil.copytree(copy, runs)
    return runs / "version_0" / "checkpoints"


def fit(config: str, *options: str) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    main(["fit", "--config", config, *options])


def go_on(config: str) -> None:
    fit(config, "--ckpt_path", "last", "--trainer.max_epochs", "2")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def plant(folder: Path, evil: Evil) -> None:
    """Put an object in the place of what is no tensor, and mend the checksums, as an attacker would."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301
    content = io.BytesIO()
    torch.save(evil, content)
    for index, place in metadata.storage_data.items():
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            file = folder / place.relative_path
            place.offset, place.length = file.stat().st_size, len(content.getvalue())
            file.write_bytes(file.read_bytes() + content.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)


def sign(folder: Path) -> None:
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    sums.pop("checksums.json", None)
    (folder / "checksums.json").write_text(json.dumps(sums, indent=0, sort_keys=True))


def test_what_is_no_tensor_runs_no_code(config: str, checkpoints: Path, tmp_path: Path, capsys: Any):
    marker = tmp_path / "ran"
    plant(checkpoints / NEWEST, Evil(marker))
    line = refused(capsys, "fit", "--config", config, "--ckpt_path", str(checkpoints / NEWEST))
    assert not marker.exists()
    assert f"ckpt_path: '{checkpoints / NEWEST}' cannot be loaded" in line


def test_metadata_that_leads_out_of_the_folder_is_refused(checkpoints: Path):
    folder = checkpoints / NEWEST
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301
    for place in metadata.storage_data.values():
        place.relative_path = "../epoch=0-step=1.ckpt/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)
    with pytest.raises(InputError, match=r"there is no file '\.\./epoch"):
        read_folder(folder)


def test_every_byte_of_a_folder_is_looked_at(checkpoints: Path):
    folder = checkpoints / NEWEST
    read_folder(folder)
    assert names_in(folder) == [".metadata", "__0_0.distcp", "checksums.json", "meta.pt"]
    for file in folder.iterdir():
        whole = file.read_bytes()
        for place in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(flip(whole, place))
            with pytest.raises(InputError, match=rf"'{folder}' is no checkpoint, or a damaged one"):
                read_folder(folder)
        file.unlink()
        with pytest.raises(InputError, match="it has no"):
            read_folder(folder)
        file.write_bytes(whole)
    (folder / "__1_0.distcp").write_bytes(b"more")
    with pytest.raises(InputError, match="wrong checksum of __1_0"):
        read_folder(folder)


def test_folder_without_its_shards_is_passed_over(config: str, checkpoints: Path, capsys: Any):
    for file in (checkpoints / NEWEST).glob("*.distcp"):
        file.unlink()
    go_on(config)
    shown = capsys.readouterr().err
    assert f"passed over: '{checkpoints / NEWEST}' is no checkpoint, or a damaged one: it has no __0_0.distcp" in shown
    assert f"the newest checkpoint is '{checkpoints}/epoch=0-step=2.ckpt', of step 2" in shown


def test_weights_that_are_not_finite_are_not_written(
    config: str, checkpoints: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    steps = XPOLightningModule.training_step

    def broken(self: XPOLightningModule, *arguments: Any) -> None:
        steps(self, *arguments)
        with torch.no_grad():
            next(self.policy.parameters()).mul_(float("nan"))

    monkeypatch.setattr(XPOLightningModule, "training_step", broken)
    line = refused(
        capsys, "fit", "--config", config, "--ckpt_path", str(checkpoints / NEWEST), "--trainer.max_epochs=2"
    )
    assert "holds nan or inf; the checkpoints before it are intact" in line
    assert not list(checkpoints.parent.parent.glob("version_1/checkpoints/*"))


def test_full_disk_leaves_the_folders_of_before(config: str, checkpoints: Path, capsys: Any):
    size = (checkpoints / NEWEST / "__0_0.distcp").stat().st_size
    before = names_in(checkpoints)
    with file_size_limit(size // 2):
        line = refused(
            capsys, "fit", "--config", config, "--ckpt_path", str(checkpoints / NEWEST), "--trainer.max_epochs=2"
        )
    assert "epoch=1-step=3.ckpt' could not be written" in line
    assert "File too large" in line
    assert names_in(checkpoints) == before
    assert names_in(checkpoints.parent.parent / "version_1" / "checkpoints") == []


@pytest.mark.parametrize("moment", ["while it was written", "between the renames", "before the old one was removed"])
def test_what_a_kill_leaves_is_taken_up_or_removed(config: str, checkpoints: Path, capsys: Any, moment: str):
    newest = checkpoints / NEWEST
    part, old = (checkpoints / f".{NEWEST}.{GONE}.{state}" for state in ("part", "old"))
    if moment == "between the renames":
        shutil.copytree(newest, part)
        newest.rename(old)
    else:
        shutil.copytree(newest, part if moment == "while it was written" else old)
    go_on(config)
    assert f"the newest checkpoint is '{newest}', of step 2" in capsys.readouterr().err
    assert names_in(checkpoints) == [
        *(f"epoch={(step - 1) // 2}-step={step}.ckpt" for step in (1, 2, 3, 4)),
        "last.ckpt",
    ]
