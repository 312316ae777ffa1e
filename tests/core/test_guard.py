"""Numbers that are not finite stop a run, or are left out, before they can reach a weight."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly, longer_is_better, quiet_trainer
from torch import Tensor

from xpo_lightning import InputError, PythonReward, SigmoidLoss, XPOLightningModule
from xpo_lightning.callbacks import RunCheckpoint
from xpo_lightning.core.errors import NonFiniteError
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.losses.schedules import FIRST_STEP

MakeModule = Callable[..., XPOLightningModule]
CALLS_BEFORE = 2
"""Steps that go well before the one that does not."""


class Bad:
    """Counts calls, and tells which of them go wrong: the third, and if `for_ever` all after it."""

    def __init__(self, for_ever: bool = False) -> None:
        self.calls, self.for_ever = 0, for_ever

    def now(self) -> bool:
        self.calls += 1
        return self.calls > CALLS_BEFORE and (self.for_ever or self.calls == CALLS_BEFORE + 1)


def bad_scores(bad: Bad, value: float) -> PythonReward:
    def function(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        scores = longer_is_better(prompts, completions, columns)
        return [value, *scores[1:]] if bad.now() else scores

    return PythonReward(function)


class BadLoss(SigmoidLoss):
    """A loss that is not finite, or that is 0 and has no gradient there."""

    def __init__(self, bad: Bad, kind: str) -> None:
        super().__init__()
        self.bad, self.kind = bad, kind

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        loss = super().__call__(*args, **options)
        if not self.bad.now():
            return loss
        return (loss * 0).sqrt() if self.kind == "gradient" else loss / (loss.detach() * 0)


class Poison(pl.Callback):
    """Spoils a weight before the third step, as a faulty optimizer or a defective device would."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == CALLS_BEFORE:
            with torch.no_grad():
                pl_module.trained_parameters()[0].fill_(math.nan)


def options_for(kind: str, bad: Bad) -> dict[str, Any]:
    if kind in ("nan", "inf"):
        return {"reward": bad_scores(bad, float(kind))}
    return {"preference_loss": BadLoss(bad, kind)}


def fitted(make_module: MakeModule, prompts: int = 10, batch_size: int = 2, **options: Any) -> tuple[Any, Recorder]:
    callbacks = options.pop("callbacks", [])
    module, recorder = make_module(learning_rate=1e-2, lr_schedule="constant", **options), Recorder()
    given = [f"{PROMPTS[n % len(PROMPTS)]} {n}" for n in range(prompts)]
    try:
        fit_quietly(module, given, batch_size=batch_size, callbacks=[recorder, *callbacks])
    except Exception as error:
        error.module, error.recorder = module, recorder  # type: ignore[attr-defined]
        raise
    return module, recorder


def weights_of(module: XPOLightningModule) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.trained_parameters()]


@pytest.mark.parametrize("kind", ["nan", "inf", "loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_step_and_names_the_prompts(
    make_module: MakeModule, kind: str
):
    with pytest.raises(NonFiniteError) as stopped:
        fitted(make_module, **options_for(kind, Bad()))
    message, recorder = str(stopped.value), stopped.value.recorder  # type: ignore[attr-defined]
    third = [f"{PROMPTS[n % len(PROMPTS)]} {n}" for n in (4, 5)]
    assert any(prompt in message for prompt in third), message
    assert {"nan": "nan", "inf": "inf", "loss": "loss", "gradient": "gradient"}[kind] in message
    assert len(recorder.steps) == CALLS_BEFORE
    module, _ = fitted(make_module, prompts=2 * CALLS_BEFORE)
    for before, after in zip(weights_of(module), weights_of(stopped.value.module), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["nan", "loss", "gradient"])
def test_a_step_may_be_left_out_and_the_others_are_taken(make_module: MakeModule, kind: str):
    module, recorder = fitted(make_module, max_skipped_steps=1, **options_for(kind, Bad()))
    assert recorder.of("skipped_steps") == [0, 0, 1, 1, 1]
    assert [step["step"] for step in recorder.steps] == [1, 2, 2, 3, 4]
    assert all(bool(weight.isfinite().all()) for weight in module.trained_parameters())
    assert all(bool(state["step"] == 4) for state in module.optimizers().optimizer.state.values())


def test_too_many_in_a_row_stop_the_run_and_steps_between_them_do_not_count(make_module: MakeModule):
    with pytest.raises(NonFiniteError) as stopped:
        fitted(make_module, max_skipped_steps=2, **options_for("nan", Bad(for_ever=True)))
    assert len(stopped.value.recorder.steps) == CALLS_BEFORE + 2  # type: ignore[attr-defined]
    calls = iter(range(100))

    def every_other(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return [math.nan if next(calls) % 2 else 1.0 for _ in completions[:1]] * len(completions)

    _, recorder = fitted(make_module, max_skipped_steps=1, reward=PythonReward(every_other))
    assert recorder.steps[-1]["skipped_steps"] == 2


def test_spoiled_weights_are_found_by_the_next_rollout_and_reach_no_checkpoint(make_module: MakeModule, tmp_path: Path):
    module = make_module()
    trainer = quiet_trainer(
        callbacks=[Poison(), RunCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)],
        enable_checkpointing=True,
    )
    loader = torch.utils.data.DataLoader([*PROMPTS, *PROMPTS], batch_size=2, collate_fn=list)
    with pytest.raises(NonFiniteError, match="the policy's log-probability of its own completion is nan for 2 of 2"):
        trainer.fit(module, loader)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "epoch=0-step=1.ckpt",
        "epoch=0-step=2.ckpt",
        "last.ckpt",
    ]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_negative_number_of_steps_to_leave_out_is_refused(make_module: MakeModule):
    with pytest.raises(InputError, match=r"model\.max_skipped_steps must be at least 0, but is -1"):
        make_module(max_skipped_steps=-1)


def test_stop_iteration_anywhere_in_a_step_is_an_error(make_module: MakeModule):
    module = make_module()

    def weights(progress: Any) -> dict[str, float]:
        if progress is FIRST_STEP:  # what alpha and beta are is looked at before training, too
            return {"alpha": 0.0, "beta": 0.1}
        raise StopIteration("no more")

    module.objective.weights = weights  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="StopIteration was raised in a training step: no more"):
        fit_quietly(module, PROMPTS)


def test_prediction_stops_when_asked(make_module: MakeModule):
    module = make_module()
    module.guard.stop.status = 143
    with pytest.raises(StopAsked) as stopped:
        quiet_trainer().predict(module, torch.utils.data.DataLoader(PROMPTS, collate_fn=list))
    assert stopped.value.code == 143
