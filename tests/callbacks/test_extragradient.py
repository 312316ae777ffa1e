"""EGPO's extragradient: each second step is from where the policy was, on pairs from where the first one led."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, fit_quietly, loader, quiet_trainer
from torch import Tensor, nn

from xpo_lightning import (
    BufferOptions,
    Experience,
    InputError,
    IPOLoss,
    LabelRule,
    PolicySampler,
    XPOLightningModule,
)
from xpo_lightning.callbacks import Extragradient

MakeModule = Callable[..., XPOLightningModule]
Weights = dict[str, Tensor]
BETA = 0.5
SGD = partial(torch.optim.SGD, lr=0.02)


class Watch(pl.Callback):
    """Keeps the pairs of each batch and the weights after it; may write checkpoints."""

    def __init__(self, folder: Path | None = None) -> None:
        self.pairs: list[Experience] = []
        self.weights: list[Weights] = []
        self.folder = folder

    def on_pairs_collected(self, trainer: Any, module: Any, experience: Experience) -> None:
        self.pairs.append(experience)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in module.policy.named_parameters()})
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def made(make_module: MakeModule, **options: Any) -> XPOLightningModule:
    """Make a module of online IPO with probabilities as labels."""
    base = {"sampler": PolicySampler(), "preference_loss": IPOLoss(), "labels": LabelRule("soft"), "alpha": 0.0}
    plain = {"beta": BETA, "max_grad_norm": None, "optimizer": SGD, "lr_schedule": "constant"}
    return make_module(spec={"dtype": "float32", "dropout": 0.0}, **{**base, **plain, **options})


def naive_logps(model: nn.Module, pairs: Experience, side: str) -> Tensor:
    """Score each row alone, by transformers' own forward pass, with gradient."""
    written, rows = getattr(pairs.completions, side), []
    for row in range(len(pairs)):
        prompt, own = pairs.prompts.ids[row][pairs.prompts.mask[row]], written.ids[row][written.mask[row]]
        logits = model(input_ids=torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.float().log_softmax(1).gather(1, own[:, None]).sum())
    return torch.stack(rows)


def naive_step(model: nn.Module, weights: Weights, reference: Weights, pairs: Experience, rate: float) -> Weights:
    """Return weights - rate times the gradient there of online IPO's (m - (P - 1/2)/beta)^2."""
    model.load_state_dict(reference, strict=False)
    with torch.no_grad():
        before = naive_logps(model, pairs, "by_policy") - naive_logps(model, pairs, "by_sampler")
    model.load_state_dict(weights, strict=False)
    margin = naive_logps(model, pairs, "by_policy") - naive_logps(model, pairs, "by_sampler") - before
    loss = ((margin - (pairs.labels - 0.5) / BETA) ** 2).mean()
    names, values = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, values)
    return {name: value.detach() - rate * slope for name, value, slope in zip(names, values, slopes, strict=True)}


def test_steps_are_those_of_the_method_written_out(make_module: MakeModule, load_model: Callable[..., nn.Module]):
    """Two iterations of two batches, from the weights of each iteration's beginning."""
    watch, model = Watch(), load_model("llama").eval()
    module = made(make_module)
    fit_quietly(module, PROMPTS[:2] * 4, batch_size=2, callbacks=[Extragradient(), watch])
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    now = start
    for first in (0, 2):
        half = naive_step(model, now, start, watch.pairs[first], 0.02)
        model.load_state_dict(half)
        pairs = watch.pairs[first + 1]
        written = naive_logps(model, pairs, "by_sampler").tolist()
        assert pairs.completions.by_sampler.logps.tolist() == pytest.approx(written, abs=1e-3), "by the half step"
        now, unlike = naive_step(model, now, start, pairs, 0.02), naive_step(model, half, start, pairs, 0.02)
        for name, value in watch.weights[first + 1].items():
            torch.testing.assert_close(value, now[name], rtol=0, atol=1e-5)
        assert any((now[name] - unlike[name]).abs().max() > 1e-4 for name in now), "two plain steps lead elsewhere"


def test_the_optimizer_goes_back_too(make_module: MakeModule):
    """After two iterations, each weight has had two of Adam's steps; the schedule has gone on by four."""
    module = made(make_module, optimizer=None, learning_rate=1e-3, lr_schedule="linear")
    trainer = fit_quietly(
        module, PROMPTS[:2] * 4, batch_size=2, max_steps=4, max_epochs=-1, callbacks=[Extragradient()]
    )
    (optimizer,) = trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert optimizer.param_groups[0]["lr"] == 0
    assert trainer.global_step == 4


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_module: MakeModule, tmp_path: Path):
    """From between the two batches of an iteration, and from after them."""
    options: dict[str, Any] = {"optimizer": None, "learning_rate": 1e-2}
    whole = Watch(tmp_path)
    fit_quietly(made(make_module, **options), PROMPTS[:2] * 4, batch_size=2, callbacks=[Extragradient(), whole])
    for step in (1, 2):
        rest = Watch()
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[Extragradient(), rest])
        trainer.fit(made(make_module, **options), loader(PROMPTS[:2] * 4, 2), ckpt_path=tmp_path / f"{step}.ckpt")
        for name, value in whole.weights[-1].items():
            assert torch.equal(rest.weights[-1][name], value)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"updates_per_rollout": 2}, {}, r"rules out model\.updates_per_rollout"),
        ({"buffer": BufferOptions()}, {}, r"rules out model\.buffer"),
        ({}, {"max_steps": 3}, r"set trainer\.max_steps to an even number"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    make_module: MakeModule, options: dict[str, Any], trainer: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        fit_quietly(made(make_module, **options), PROMPTS[:2], callbacks=[Extragradient()], **trainer)
