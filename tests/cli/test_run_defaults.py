"""A config of one's own gives what the quickstart gives, each part of it can be switched off, all in one folder."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from conftest import BARE
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from test_configs import ParsingCLI

from xpo_lightning.callbacks import CompletionsTable, RunCheckpoint, RunSummary
from xpo_lightning.cli.lightning_cli import XPOCLI, main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
EVERY_RUN = ["RunContinuation", "GracefulStop"]
SHOWN = ["XPOProgressBar", "Baseline", "CompletionsTable", "PolicyExport", "PolicyWatch", "LearningCurves", "RunReport"]
SHOWN += ["RunSummary"]
FILES = ["config.yaml", "metrics.csv", "completions.jsonl", "curves.png", "report.html", "start.json"]
FILES += ["checkpoints/last.ckpt", "policy/model.safetensors"]
MINE = """\
model:
  policy:
    path: {model}
  reward:
    class_path: PythonReward
    init_args:
      function: {function}
  sampling:
    max_new_tokens: 5
data:
  source: prompts.jsonl
  validation_size: 4
  batch_size: 4
trainer:
  max_steps: 2
  accelerator: cpu
"""
Write = Callable[..., None]


def positive(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., str]) -> Write:
    """Go into an empty folder with prompts, and give a function that writes `mine.yaml` there, with changes."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the cat sat on {n}"}) + "\n" for n in range(12)))

    def write(function: str = f"{__name__}.positive", **changes: Any) -> None:
        config = yaml.safe_load(MINE.format(model=model_folder(), function=function))
        for key, value in changes.items():
            branch, *path, leaf = (config, *key.split("__"))
            for name in path:
                branch = branch.setdefault(name, {})
            branch[leaf] = value
        Path("mine.yaml").write_text(yaml.safe_dump(config))

    return write


class BuildingCLI(ParsingCLI):
    """Builds everything, and stops there."""

    def instantiate_classes(self) -> None:
        XPOCLI.instantiate_classes(self)


def built(*words: str, verb: str = "fit") -> pl.Trainer:
    return BuildingCLI([verb, "--config", "mine.yaml", *words]).trainer


def names(trainer: pl.Trainer) -> list[str]:
    """Name the callbacks, in alphabetical order, but for those that every run has."""
    given = {type(one).__name__ for one in trainer.callbacks} - {*EVERY_RUN, "ConfigFile"}
    return sorted(given)


def rows_of(metrics: Path) -> list[dict[str, float]]:
    with metrics.open() as lines:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(lines)]


# ---- what an own config gives ----


def test_own_config_of_15_lines_gives_what_the_quickstart_gives(
    write: Write, model_folder: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The config of docs/quickstart.md, and its `myreward.py` beside it, in a folder that nothing else is in."""
    page = (ROOT / "docs" / "quickstart.md").read_text()
    (config,), (reward,) = (re.findall(rf"^```{kind}\n(.*?)^```", page, re.S | re.M) for kind in ("yaml", "python"))
    assert len(config.splitlines()) <= 15
    Path("mine.yaml").write_text(config)
    Path("myreward.py").write_text(reward)
    Path("my_model").symlink_to(model_folder())
    Path("prompts.jsonl").rename("my_prompts.jsonl")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "myreward", raising=False)
    before = {path.name for path in Path().iterdir()}
    small = ["--trainer.max_steps=2", "--data.batch_size=4", "--data.validation_size=4", "--trainer.accelerator=cpu"]
    small += ["--model.sampling.max_new_tokens=5"]
    main(["check", "--config", "mine.yaml", *small])
    main(["fit", "--config", "mine.yaml", *small])
    folder = Path("runs/version_0")
    assert [name for name in FILES if not (folder / name).is_file()] == []
    assert {path.name for path in Path().iterdir()} - before == {"runs"}
    rows = rows_of(folder / "metrics.csv")
    assert [row["step"] for row in rows if "loss/dpo" in row] == [1, 2]
    assert [row["step"] for row in rows if "eval/win_rate" in row] == [0, 2]
    shown = capsys.readouterr().out
    for line in ("policy ", "batch ", "memory ", "run folder ", "report ", "last checkpoint ", "eval/win_rate "):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
    main(["report", "runs"])
    main(["plot", "runs"])
    main(["compare", "runs"])
    assert Path("report.html").is_file()
    assert Path("curves.png").is_file()


def test_page_lists_the_switches(write: Write):
    page = (ROOT / "docs" / "configuration.md").read_text()
    section = page.split("\n## What every run has\n")[1].split("\n## ")[0]
    switches = re.findall(r"`((?:defaults|trainer)\.\w+: false)`", section)
    assert {key.partition(":")[0] for key in switches} >= {f"defaults.{name}" for name in (*BARE, "metrics_file")}
    write()
    Path("over.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    trainer = built("--config", "over.yaml")
    assert names(trainer) == sorted({*SHOWN, "RunCheckpoint", "Throughput"} - {"RunReport"})
    assert [one.rows for one in trainer.callbacks if isinstance(one, CompletionsTable)] == [3]


def test_own_config_has_the_callbacks_of_the_quickstart(write: Write):
    write()
    own = built()
    quickstart = BuildingCLI(["fit", "--config", QUICKSTART]).trainer
    assert names(own) == names(quickstart) == sorted([*SHOWN, "RunCheckpoint"])
    for trainer in (own, quickstart):
        (saver,) = trainer.checkpoint_callbacks
        assert (saver.monitor, saver.mode, saver.save_last) == ("eval/win_rate", "max", True)
        assert trainer.log_every_n_steps == 1
        assert [type(logger).__name__ for logger in trainer.loggers] == ["ResumableCSVLogger"]


def test_run_without_validation_prompts_has_the_rest(write: Write):
    write(data__validation_size=0)
    trainer = built()
    assert names(trainer) == sorted(["RunCheckpoint", *SHOWN[:1], *SHOWN[2:]])
    assert trainer.checkpoint_callbacks[0].monitor is None
    main(["fit", "--config", "mine.yaml"])
    assert [name for name in FILES if not Path("runs/version_0", name).is_file()] == ["completions.jsonl"]


def test_last_checkpoint_is_that_of_the_last_step_between_two_validations(write: Write):
    import torch

    write(trainer__max_steps=3, trainer__val_check_interval=2, defaults=BARE)
    main(["fit", "--config", "mine.yaml"])
    folder = Path("runs/version_0/checkpoints")
    steps = {file.name: torch.load(file, weights_only=True)["global_step"] for file in folder.iterdir()}
    assert steps == {"step=2.ckpt": 2, "last.ckpt": 3}


# ---- switches ----


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("defaults.baseline", ["Baseline"]),
        ("defaults.completions_table", ["CompletionsTable"]),
        ("defaults.policy_export", ["PolicyExport"]),
        ("defaults.policy_watch", ["PolicyWatch"]),
        ("defaults.learning_curves", ["LearningCurves"]),
        ("defaults.run_report", ["RunReport"]),
        ("defaults.run_summary", ["RunSummary"]),
        ("defaults.metrics_file", ["LearningCurves", "RunReport"]),
        ("trainer.logger", ["LearningCurves", "RunReport"]),
        ("trainer.enable_progress_bar", ["XPOProgressBar"]),
        ("trainer.enable_checkpointing", ["RunCheckpoint"]),
    ],
)
def test_each_default_is_switched_off_by_a_key(write: Write, key: str, gone: list[str]):
    write()
    trainer = built(f"--{key}=false")
    assert names(trainer) == sorted({*SHOWN, "RunCheckpoint"} - {*gone})
    assert bool(trainer.loggers) == (key not in ("defaults.metrics_file", "trainer.logger"))


def test_listed_callbacks_join_the_defaults_and_replace_those_of_their_kind(write: Write):
    write()
    added = built('--trainer.callbacks=[{"class_path": "EarlyStopping", "init_args": {"monitor": "eval/win_rate"}}]')
    assert names(added) == sorted([*SHOWN, "RunCheckpoint", "EarlyStopping"])
    kinds = [
        {"class_path": "ModelCheckpoint"},
        {"class_path": "RichProgressBar"},
        {"class_path": "CompletionsTable", "init_args": {"rows": 3}},
    ]
    replaced = built(f"--trainer.callbacks={json.dumps(kinds)}")
    assert names(replaced) == sorted(["ModelCheckpoint", "RichProgressBar", *SHOWN[1:]])
    (table,) = (one for one in replaced.callbacks if isinstance(one, CompletionsTable))
    assert table.rows == 3
    assert not any(isinstance(one, RunCheckpoint) for one in replaced.callbacks)
    assert sum(isinstance(one, RichProgressBar) for one in replaced.callbacks) == 1
    assert any(isinstance(one, EarlyStopping) for one in added.callbacks)


def test_default_of_a_callback_that_is_no_plain_value_is_written_as_one(write: Write):
    write()
    timer = {"class_path": "Timer", "init_args": {"duration": "00:00:10:00"}}
    main(["fit", "--config", "mine.yaml", f"--trainer.callbacks={json.dumps([timer])}", "--trainer.max_steps=1"])
    (config,) = Path("runs").rglob("config.yaml")
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    (written,) = (one for one in callbacks if one["class_path"].endswith("Timer"))
    assert written["init_args"]["interval"] == "step"


def test_null_is_the_defaults_and_an_empty_list_is_none_of_them(write: Write):
    write()
    assert names(built("--trainer.callbacks=null")) == sorted([*SHOWN, "RunCheckpoint"])
    assert set(names(built("--trainer.callbacks=[]"))) & {*SHOWN} == set()
    assert names(built("--trainer.barebones=true")) == []


def test_fast_dev_run_leaves_nothing(write: Write):
    write(trainer__fast_dev_run=True)
    main(["fit", "--config", "mine.yaml"])
    assert {path.name for path in Path().iterdir()} == {"mine.yaml", "prompts.jsonl"}


def test_baseline_comes_without_a_key_and_a_shorter_check_is_honoured(write: Write):
    write(trainer__num_sanity_val_steps=1, defaults={**BARE, "baseline": True})
    assert "Baseline" not in names(built())
    assert "Baseline" in names(built("--trainer.num_sanity_val_steps=null"))
    assert "Baseline" in names(built("--trainer.num_sanity_val_steps=-1"))
    assert "Baseline" not in names(built("--trainer.num_sanity_val_steps=-1", "--trainer.limit_val_batches=0"))


def test_config_shows_the_switches_and_a_saved_one_repeats_the_run(write: Write, capsys: pytest.CaptureFixture[str]):
    write(defaults={"run_report": False})
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mine.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    switches = {**dict.fromkeys(BARE, True), "metrics_file": True, "run_report": False}
    assert printed["defaults"] == switches
    assert printed["trainer"]["log_every_n_steps"] == 1
    main(["fit", "--config", "mine.yaml"])
    saved = Path("runs/version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["defaults"] == switches
    main(["fit", "--config", str(saved)])
    first, second = (Path(f"runs/version_{n}") for n in (0, 1))
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}


def test_quickstart_is_configured_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The recipe has become shorter; what it trains, and how it is measured, has not changed."""
    monkeypatch.chdir(tmp_path)
    trainer = BuildingCLI(["fit", "--config", QUICKSTART]).trainer
    assert (trainer.max_steps, trainer.max_epochs, trainer.val_check_interval) == (60, -1, 20)
    (saver,) = trainer.checkpoint_callbacks
    assert saver.filename == "{step}"
    assert Path(trainer.loggers[0].log_dir) == Path("runs/quickstart/version_0")
    kept = [type(one) for one in trainer.callbacks]
    assert kept.index(CompletionsTable) < kept.index(RunSummary)


# ---- loggers and the folder ----


@pytest.mark.parametrize("recipe", ["quickstart", "smollm2", "tldr", "8b_lora_one_gpu"])
def test_folder_of_a_recipe_is_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str):
    monkeypatch.chdir(tmp_path)
    config: Namespace = ParsingCLI(["fit", "--config", recipe, "--trainer.default_root_dir", "X"]).config.fit
    assert config.trainer.logger is None
    assert config.trainer.default_root_dir == "X"
    assert f"runs/{recipe}" not in str({**config, "config": None})


def test_everything_goes_into_the_root_folder(write: Write):
    write()
    main(["fit", "--config", "mine.yaml", "--trainer.default_root_dir", "X/Y"])
    assert [name for name in FILES if not Path("X/Y/version_0", name).is_file()] == []
    assert {path.name for path in Path().iterdir()} == {"mine.yaml", "prompts.jsonl", "X"}


def test_own_logger_comes_after_the_metrics_file(write: Write):
    board = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "board", "name": "x"}}
    write(trainer__logger=board)
    main(["fit", "--config", "mine.yaml"])
    assert [name for name in FILES if not Path("runs/version_0", name).is_file()] == []
    assert list(Path("board/x/version_0").glob("events.*"))
    main(["report", "runs"])
    assert Path("report.html").is_file()


def test_own_metrics_file_is_the_only_one(write: Write):
    write(trainer__logger={"class_path": "CSVLogger", "init_args": {"save_dir": "own", "name": "x"}})
    (logger,) = built().loggers
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir) == Path("own/x/version_0")


def test_run_without_a_metrics_file_says_so_when_it_is_read(write: Write, capsys: pytest.CaptureFixture[str]):
    write(trainer__logger=False, trainer__enable_progress_bar=False)
    main(["fit", "--config", "mine.yaml"])
    with pytest.raises(SystemExit):
        main(["report", "runs"])
    assert "has a metrics.csv; give the folder of a run that has logged something" in capsys.readouterr().err
