"""Callbacks and modules that are used again, steps that are skipped, and validations without a judge's answer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import PROMPTS, fit_quietly, loader, longer_is_better, quiet_trainer

from xpo_lightning import PythonJudge, PythonReward, XPOLightningModule
from xpo_lightning.callbacks import CompletionsTable, PolicyExport, PolicyWatch, RunCheckpoint, RunSummary
from xpo_lightning.core.errors import NonFiniteError

MakeModule = Callable[..., XPOLightningModule]
OFTEN: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_epochs": -1}


@pytest.fixture
def bad() -> dict[str, bool]:
    """Say whether the reward gives a score that is not finite."""
    return {"now": False}


@pytest.fixture
def module(make_module: MakeModule, bad: dict[str, bool]) -> XPOLightningModule:
    def reward(prompts: Any, completions: Any, columns: Any) -> list[float]:
        return [math.nan] * len(completions) if bad["now"] else longer_is_better(prompts, completions, columns)

    return make_module(reward=PythonReward(reward), max_skipped_steps=2)


def test_callbacks_of_an_earlier_run_begin_anew(make_module: MakeModule, tmp_path: Path):
    export, table = PolicyExport(at="best"), CompletionsTable(every_n_validations=2, terminal=False, logger=False)
    shown = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        trainer = quiet_trainer(callbacks=[export, table], default_root_dir=folder, max_steps=3, **OFTEN)
        pl.seed_everything(1, verbose=False)
        trainer.fit(make_module(), loader(PROMPTS, 2), loader(PROMPTS, 2))
        assert (folder / "policy" / "model.safetensors").is_file()
        shown.append((folder / "completions.jsonl").read_text())
    assert shown[0] == shown[1]


def test_module_of_an_earlier_run_has_skipped_no_steps(module: XPOLightningModule, bad: dict[str, bool]):
    for _ in range(2):
        bad["now"] = True
        with pytest.raises(NonFiniteError):
            fit_quietly(module, PROMPTS, 1)
        assert module.guard.skipped == 2
    bad["now"] = False
    assert fit_quietly(module, PROMPTS, 1).callback_metrics["skipped_steps"] == 0


def test_skipped_steps_are_not_watched(make_module: MakeModule, tmp_path: Path):
    class Broken(pl.Callback):
        """Makes the gradients of the second batch, whose pairs are collected, useless."""

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.objective.weights = lambda _: {"alpha": math.nan if batch_idx == 1 else 1e-5, "beta": 0.1}

    watch = PolicyWatch(window=5)
    module = make_module(learning_rate=1e-2, max_skipped_steps=2)
    fit_quietly(module, PROMPTS[:3], 1, callbacks=[Broken(), watch], default_root_dir=tmp_path, log_every_n_steps=1)
    assert len(watch.state_dict()["seen"]) == 2


@pytest.mark.parametrize("silent", [1, 2, 3])
def test_validation_without_any_answer_is_none_of_the_best(make_module: MakeModule, tmp_path: Path, silent: int):
    def judge(prompts: Any, firsts: Any, seconds: Any, columns: Any) -> list[float | None]:
        return [None if len(prompts) == 3 and module.global_step == silent else 0.9] * len(prompts)

    module = make_module(reward=PythonJudge(judge, shuffle=False))
    saving = RunCheckpoint(tmp_path, "{step}", monitor="eval/win_rate", mode="max", save_top_k=3, save_last=True)
    callbacks = [saving, RunSummary(), PolicyExport(at="best", monitor="eval/win_rate")]
    trainer = quiet_trainer(
        callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path, max_steps=3, **OFTEN
    )
    trainer.fit(module, loader(PROMPTS[:2], 2), loader(PROMPTS[:3], 3))
    ranked = {Path(file).stem: float(score) for file, score in saving.best_k_models.items()}
    assert ranked == {f"step={step}": -math.inf if step == silent else 1.0 for step in (1, 2, 3)}
    assert math.isnan(trainer.callback_metrics["eval/win_rate"]) == (silent == 3)
