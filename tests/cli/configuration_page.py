"""The configuration page: its blocks, and a run of each on the quickstart."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import yaml
from conftest import BARE

from xpo_lightning import Experience
from xpo_lightning.cli.lightning_cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

# What makes a run small; before the block, which may want some of it back.
SMALL = """
trainer:
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_checkpointing: false
  enable_model_summary: false
  callbacks: []
""" + yaml.safe_dump({"defaults": BARE})
SIZES = {"trainer.max_steps": 2, "data.batch_size": 4, "model.sampling.max_new_tokens": 6}


# ---- the page ----


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PROSE = re.sub(r"^```.*?^```\n", "", PAGE, flags=re.DOTALL | re.MULTILINE)
HEADINGS = re.findall(r"^##+ (.+)$", PROSE, re.MULTILINE)
SECTIONS = {part.split("\n")[0]: re.split(r"\n## ", part)[0] for part in PAGE.split("\n### ")[1:]}
MODULES = {block.split("\n")[0].removeprefix("# "): block for block in blocks(PAGE, "python")}


def overlay(title: str) -> str:
    (block,) = blocks(SECTIONS[title], "yaml")
    return block


# ---- a run of one block ----


@dataclass
class Run(pl.Callback):
    """A run: what was logged at each batch, the pairs of each, and what it was made of."""

    steps: list[dict[str, float]] = field(default_factory=list)
    pairs: list[Experience] = field(default_factory=list)
    last: ClassVar["Run"]

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        Run.last, self.trainer, self.module = self, trainer, pl_module

    def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        self.pairs.append(experience)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def folder(self) -> Path:
        return Path(self.trainer.log_dir)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def run(tmp_path: Path, block: str, small: str = SMALL, **overrides: Any) -> Run:
    """Run a block; `overrides` are keys with `__` for a dot."""
    for name, text in {"small": small, "mine": block}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    settings = {**SIZES, **{key.replace("__", "."): value for key, value in overrides.items()}}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = [word for name in (QUICKSTART, "small.yaml", "mine.yaml") for word in ("--config", name)]
    main(["fit", *files, *words, "--trainer.callbacks+", f"{{class_path: {__name__}.Run}}"])
    assert len(Run.last.steps) >= 1
    return Run.last


def check_settings(done: Run, block: str, overrides: dict[str, Any]) -> None:
    """See that the run took every value of the block, but those that had to be overridden."""
    used = dict(leaves(yaml.safe_load((done.folder / "config.yaml").read_text())))
    overridden = {*SIZES, *(key.replace("__", ".").replace(".init_args", "") for key in overrides)}
    values = {key: value for key, value in leaves(yaml.safe_load(block)) if key not in overridden}
    assert values == {key: used[key] for key in values}


def passes(check: Callable[[Run], Any], done: Run) -> bool:
    """Tell whether a check is met; one for another class may look for what is not there."""
    try:
        return bool(check(done))
    except (AttributeError, KeyError, IndexError):
        return False


def leaves(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give each value of a config by its key; a class by its name, whatever module it is in, and however it is put."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            key = path if name == "class_path" else f"{path}.{name}".removeprefix(".").replace(".init_args", "")
            yield from leaves(value, key)
    elif isinstance(settings, list) and any(isinstance(one, dict | str) for one in settings):
        for number, value in enumerate(settings):
            yield from leaves(value, f"{path}.{number}")
    else:
        is_name = isinstance(settings, str) and re.fullmatch(r"[\w.]+", settings)
        yield path, settings.rpartition(".")[2] if is_name else settings
