"""The choice of the checkpoint to go on from, and the settings of a run that goes on."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import test_cli
import torch
import yaml
from damage import GONE, checkpoint_of, cut, empty, flip, names_in
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from test_cli import Write, refused, rows_of

from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO
from xpo_lightning.checkpointing.resume import Place, newest_checkpoint
from xpo_lightning.cli.lightning_cli import XPOCLI, main
from xpo_lightning.core.owner import this_process

write_config, prompts_file = test_cli.write_config, test_cli.prompts_file
CSV_LOGGER, TENSORBOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
EVERY_STEP = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
}


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
