"""The page about seeing a run: its loggers log, its bar and its start are those of the quickstart."""

import importlib.util
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import refused
from test_configs import parse

from xpo_lightning.callbacks import progress_bar as progress
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.reporting.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "seeing.md").read_text()
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
BLOCKS = {part.split("\n")[0]: re.search(r"```yaml\n(.*?)```", part, re.DOTALL)[1] for part in PAGE.split("\n### ")[1:]}
PACKAGES = {"Weights & Biases": "wandb", "MLflow": "mlflow"}
SMALL = """
model:
  sampling:
    max_new_tokens: 4
data:
  batch_size: 4
  validation_batch_size: 4
trainer:
  max_steps: 2
  num_sanity_val_steps: 0
  limit_val_batches: 1
  val_check_interval: 2
  enable_checkpointing: false
  callbacks: [CompletionsTable, LearningCurves, RunReport, RunSummary]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def overlay(title: str) -> list[str]:
    Path("mine.yaml").write_text(BLOCKS[title])
    Path("small.yaml").write_text(SMALL)
    return ["--config", QUICKSTART, "--config", "small.yaml", "--config", "mine.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("title", ["CSV", "TensorBoard"])
def test_logger_logs_beside_what_the_callbacks_leave(title: str):
    main(["fit", *overlay(title)])
    folder = Path("logs/tries/first" if title == "CSV" else "runs/mine/version_0")
    metrics = read_metrics(folder / "metrics.csv")
    assert metrics["loss/dpo"].steps == [1, 2]
    for name in ("curves.png", "report.html", "completions.jsonl", "start.json", "config.yaml"):
        assert (folder / name).is_file()
    start = json.loads((folder / "start.json").read_text())["run"]
    for name in ("policy", "reference", "reward", "training", "validation"):  # the small run's are the quickstart's
        assert f"\n{name:10}  {start[name]}\n" in PAGE
    events = [*Path("runs/mine/tensorboard").rglob("events.*")]
    assert bool(events) == (title == "TensorBoard")
    for file in events:
        written = EventAccumulator(str(file))
        written.Reload()
        assert [event.step for event in written.Scalars("loss/dpo")] == [1, 2]
        assert any("eval/completions" in tag for tag in written.Tags()["tensors"])


@pytest.mark.parametrize("title", PACKAGES)
def test_logger_parses(title: str):
    (logger,) = parse("fit", *overlay(title)).trainer.logger
    (asked,) = yaml.safe_load(BLOCKS[title])["trainer"]["logger"]
    taken = logger.init_args.as_dict() | logger.get("dict_kwargs", {})
    assert asked["init_args"].items() <= taken.items()


@pytest.mark.parametrize(("title", "package"), PACKAGES.items())
def test_logger_without_its_package_is_refused(title: str, package: str, capsys: pytest.CaptureFixture[str]):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    line = refused(capsys, "fit", *overlay(title))
    asked = yaml.safe_load(BLOCKS[title])["trainer"]["logger"][0]["class_path"]
    assert f"the config cannot be used: '{asked}': Requirement '{package}" in line


def test_logger_of_lightning_ai_is_taken_and_logs(monkeypatch: pytest.MonkeyPatch):
    """`litlogger` is a stand-in, which keeps what it is sent."""
    (source,) = re.findall(r"```python\n# my_loggers.py\n(.*?)```", PAGE, re.DOTALL)
    Path("my_loggers.py").write_text(source)
    monkeypatch.syspath_prepend(".")
    sent = defaultdict(list)

    class Experiment(dict):
        def __init__(self, **options: Any) -> None:
            sent["name"].append(options["name"])

        def __missing__(self, key: str) -> Any:
            return SimpleNamespace(append=lambda value, step: sent[key].append((step, value)))

        def print_url(self) -> None: ...

    monkeypatch.setitem(sys.modules, "litlogger", SimpleNamespace(Experiment=Experiment))
    config = parse("fit", *overlay("Lightning.ai")).trainer.logger[1]
    module, _, name = config.class_path.rpartition(".")
    logger = getattr(sys.modules[module], name)(**config.init_args.as_dict())
    assert Trainer(logger=logger, accelerator="cpu").loggers == [logger]
    logger.log_metrics({"loss/dpo": 0.5}, step=3)
    assert sent["loss/dpo"] == [(3, 0.5)]
    assert [name[:5] for name in sent["name"]] == ["mine-"]


def test_page_names_what_the_bar_shows():
    table = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
    assert table == [*progress.SHORT_NAMES.values(), "tok/s", "left"]


def test_every_block_is_looked_at():
    assert set(BLOCKS) == {"CSV", "TensorBoard", "Lightning.ai", *PACKAGES}
