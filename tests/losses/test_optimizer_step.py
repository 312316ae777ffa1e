"""The optimizer step that is taken on the objective, against one written out by hand."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly
from torch import Tensor, nn
from torch.optim import SGD

from xpo_lightning import Experience


def sgd(parameters: list[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.5)


def trained(make_module: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Take one SGD step on eight prompts; return the weights and what was logged."""
    recorder = Recorder()
    module = make_module(alpha=0.05, beta=0.2, optimizer=sgd, lr_schedule="constant", **options)
    fit_quietly(module, (PROMPTS * 2)[:8], callbacks=[recorder])
    weights = {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
    return weights, recorder.steps[0]


@pytest.mark.parametrize("max_grad_norm", [None, 0.01], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_of_any_size_take_the_same_step(make_module: Any, size: int, max_grad_norm: float | None):
    whole, logged = trained(make_module, micro_batch_size=8, max_grad_norm=max_grad_norm)
    split, logged_too = trained(make_module, micro_batch_size=size, max_grad_norm=max_grad_norm)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert logged_too["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert logged_too["loss/total"] == pytest.approx(logged["loss/total"], rel=1e-5)


def test_clipped_step_has_the_length_of_the_limit(make_module: Any, load_model: Any):
    """SGD moves the weights by the learning rate times the clipped gradient: 0.5 * 0.01 = 0.005."""
    weights, logged = trained(make_module, max_grad_norm=0.01)
    before = dict(load_model().named_parameters())
    moved = sum((weight - before[name]).double().square().sum().item() for name, weight in weights.items()) ** 0.5
    assert logged["grad_norm"] > 0.02
    assert moved == pytest.approx(0.005, rel=1e-3)


def test_one_step_equals_the_step_written_out_by_hand(make_module: Any, load_model: Any):
    """The mean over pairs of -log sigma(+-beta margin) + alpha log pi(sampler's), differentiated row by row."""
    module = make_module(alpha=0.05, beta=0.2, optimizer=sgd, lr_schedule="constant", max_grad_norm=None)
    collected: list[Experience] = []
    module.configure_model()

    class Keep(pl.Callback):
        def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
            collected.append(experience)

    fit_quietly(module, PROMPTS, callbacks=[Keep()])
    (pairs,) = collected
    assert {0.0, 1.0} <= set(pairs.labels.tolist())
    assert not pairs.identical.any()

    model, reference, total = load_model(), load_model(), 0.0
    for row in range(len(pairs)):
        prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]]
        ratios, explored = [], None
        for side in (pairs.completions.by_policy, pairs.completions.by_sampler):
            ids = torch.cat([prompt, side.ids[row][side.mask[row]]])[None]
            logps = []
            for scorer in (model, reference):
                steps = scorer(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                logps.append(steps.gather(1, ids[0, len(prompt) :, None]).sum())
            ratios.append(logps[0] - logps[1].detach())
            explored = logps[0]
        margin, label = 0.2 * (ratios[0] - ratios[1]), pairs.labels[row].item()
        won, lost = nn.functional.logsigmoid(margin), nn.functional.logsigmoid(-margin)
        total = total - label * won - (1 - label) * lost + 0.05 * explored
    (total / len(pairs)).backward()
    after = dict(module.policy.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(after[name], weight.detach() - 0.5 * weight.grad, rtol=1e-4, atol=1e-5, msg=name)
