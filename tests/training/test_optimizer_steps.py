"""How far an optimizer step moves the weights: by the clipped gradient of this batch alone, without decay."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly
from torch import Tensor

from xpo_lightning import Sampling


class Moves(pl.Callback):
    """Keeps how far all weights together move in each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def weights(self, module: pl.LightningModule) -> Tensor:
        return torch.cat([weight.detach().flatten().clone() for weight in module.policy.parameters()])

    def on_train_batch_start(self, trainer, module, *_) -> None:
        self.before = self.weights(module)

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.norms.append((self.weights(module) - self.before).norm().item())


def plain_sgd(rate: float):
    return lambda weights: torch.optim.SGD(weights, lr=rate)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_step_of_sgd_moves_the_weights_by_the_rate_times_the_clipped_gradient(make_module, limit):
    """The logged norm is that before clipping, here above 1."""
    module = make_module(alpha=0.1, optimizer=plain_sgd(0.01), lr_schedule="constant", max_grad_norm=limit)
    moves, recorder = Moves(), Recorder()
    fit_quietly(module, PROMPTS, 3, callbacks=[moves, recorder])
    norms = recorder.of("grad_norm")
    assert len(norms) == 2
    assert min(norms) > 1
    assert moves.norms == pytest.approx([0.01 * (norm if limit is None else limit) for norm in norms], rel=1e-3)


def test_the_gradient_of_one_step_is_gone_in_the_next(make_module):
    """At a rate of 0, the same greedy pairs have the same gradient three times."""
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    module = make_module(alpha=0.1, optimizer=plain_sgd(0.0), lr_schedule="constant", sampling=sampling)
    recorder = Recorder()
    fit_quietly(module, PROMPTS, max_epochs=3, callbacks=[recorder])
    first, second, third = recorder.of("grad_norm")
    assert (second, third) == pytest.approx((first, first), rel=1e-4)


def test_the_gradient_is_a_mean_over_pairs(make_module):
    """The same greedy pairs three times over have the gradient that they have once."""
    norms = []
    for prompts in (PROMPTS, PROMPTS * 3):
        recorder = Recorder()
        module = make_module(alpha=0.1, sampling=Sampling(max_new_tokens=6, temperature=0.0), micro_batch_size=4)
        fit_quietly(module, prompts, max_steps=1, callbacks=[recorder])
        norms += recorder.of("grad_norm")
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_weights_without_a_gradient_stay_as_they_are(make_module):
    """A token that no row holds has an embedding without a gradient, which weight decay would move."""
    module = make_module(alpha=0.1, learning_rate=0.1, lr_schedule="constant")
    module.configure_model()
    before = module.policy.get_input_embeddings().weight.detach().clone()
    fit_quietly(module, PROMPTS, max_steps=1)
    moved = (module.policy.get_input_embeddings().weight != before).any(1)
    assert 0 < moved.sum() < len(moved) // 2


def test_a_run_ends_with_the_steps_or_the_epochs_whichever_come_first(make_module):
    """One step an epoch: 2 steps of 3 epochs, at 1 and 1/2 of the rate; 3 epochs of 5 steps, at 1, 2/3 and 1/3."""
    for options, shares in (({"max_steps": 2}, [1, 1 / 2]), ({"max_steps": 5}, [1, 2 / 3, 1 / 3])):
        recorder = Recorder()
        fit_quietly(make_module(learning_rate=0.01), PROMPTS, max_epochs=3, callbacks=[recorder], **options)
        assert recorder.of("lr") == pytest.approx([0.01 * share for share in shares])


def test_settings_of_the_config_replace_those_that_came_with_a_checkpoint(make_module):
    module = make_module(optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.5))
    optimizer, scheduler = module.optimization.build([torch.nn.Parameter(torch.zeros(1))])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"momentum": 0.2, "weight_decay": 0.1}
    optimizer.load_state_dict(saved)
    module.optimization.take_settings(optimizer, scheduler)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.5)
