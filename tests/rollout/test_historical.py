"""Historical sampling: one of the policy's iterates so far writes the second completion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, fit_quietly, loader, quiet_trainer
from test_samplers import KINDS, Watch, sums
from torch import nn

from xpo_lightning import HistoricalPolicySampler, InputError, PreviousPolicySampler, VLLMRollout, XPOLightningModule
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.reporting.memory.run_plan import standing_memory

MakeModule = Callable[..., XPOLightningModule]


class Numbered(nn.Module):
    """A policy whose only weight says after how many batches it is that."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))


def drawn(seed: int, batches: int, **options: Any) -> tuple[list[int], HistoricalPolicySampler]:
    """Return which policy, by the number of batches before it, writes each batch."""
    sampler, policy = HistoricalPolicySampler(**options), Numbered()
    torch.manual_seed(seed)
    sampler.begin(policy)
    found = []
    for batch in range(1, batches + 1):
        found.append(int(sampler.held[sampler.chosen].weights["number"]))
        with torch.no_grad():
            policy.number.fill_(batch)
        sampler.after_batch(batch, policy)
        assert len(sampler.held) <= sampler.keep
    return found, sampler


@pytest.mark.parametrize("keep", [2, 100])
def test_each_iterate_so_far_is_drawn_equally_often(keep: int):
    """Of 400 runs, the 5th batch is by each of the 5 iterates in 80 or so: 4 standard errors are 32."""
    counts = [0] * 5
    for seed in range(400):
        counts[drawn(seed, 5, keep=keep)[0][-1]] += 1
    assert all(abs(count - 80) < 32 for count in counts), counts


def test_iterates_are_those_of_the_beginnings_of_iterations():
    found, sampler = drawn(3, 12, every=3, keep=100)
    assert [int(one.weights["number"]) for one in sampler.held] == [0, 3, 6, 9, 12]
    assert set(found[:3]) == {0}
    assert set(found) <= {0, 3, 6, 9}
    assert len(set(found)) > 1


def naive(seed: int, batches: int, keep: int) -> list[int]:
    """Draw from a reservoir of iterates, written out."""
    reservoir, used = [0], [0]
    for done in range(1, batches):
        numbers = RolloutRNG(seed, Stream.SAMPLER, done).uniforms(1, 2)
        if len(reservoir) < keep:
            reservoir.append(done)
        elif numbers[0, 0] < keep / (done + 1):  # replaces one of them, each with the same probability
            reservoir[int(numbers[0, 0] * (done + 1))] = done
        used.append(reservoir[int(numbers[0, 1] * len(reservoir))])
    return used


@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_by_the_iterate_that_was_drawn(make_module: MakeModule, kind: str):
    watch, used = Watch(), naive(0, 6, keep=3)
    module = make_module(sampler=HistoricalPolicySampler(keep=3), learning_rate=0.03, **KINDS[kind])
    fit_quietly(module, PROMPTS[:2] * 6, batch_size=2, callbacks=[watch])
    assert len(set(used)) > 2
    module.policy.eval()
    for pairs, before in zip(watch.sampled, used, strict=True):
        module.policy.load_state_dict(watch.weights[before])
        assert pairs.completions.by_sampler.logps.tolist() == pytest.approx(
            sums(module.policy, pairs, "by_sampler"), abs=1e-3
        )


class Saving(Watch):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def resumed(module: XPOLightningModule, checkpoint: Path) -> list[tuple[str, ...]]:
    watch = Watch()
    torch.manual_seed(0)
    quiet_trainer(callbacks=[watch]).fit(module, loader(PROMPTS[:2] * 8, 2), ckpt_path=checkpoint)
    return [pairs.completions.by_sampler.texts for pairs in watch.sampled]


def test_a_resumed_run_draws_as_if_it_had_not_stopped(make_module: MakeModule, tmp_path: Path):
    def make(**options: Any) -> XPOLightningModule:
        return make_module(sampler=HistoricalPolicySampler(keep=3), learning_rate=0.03, **options)

    whole, saving = make(), Saving(tmp_path)
    fit_quietly(whole, PROMPTS[:2] * 8, batch_size=2, callbacks=[saving])
    texts = [pairs.completions.by_sampler.texts for pairs in saving.sampled]
    for step in (1, 5):
        rest = make()
        assert resumed(rest, tmp_path / f"{step}.ckpt") == texts[step:]
        assert all(
            torch.equal(weight, one)
            for weight, one in zip(rest.policy.parameters(), whole.policy.parameters(), strict=True)
        )


def test_checkpoints_that_do_not_fit_are_refused(make_module: MakeModule, tmp_path: Path):
    folders = [tmp_path / "history", tmp_path / "previous"]
    for folder, sampler in zip(folders, (HistoricalPolicySampler(keep=3), PreviousPolicySampler()), strict=True):
        fit_quietly(make_module(sampler=sampler), PROMPTS[:2] * 4, batch_size=2, callbacks=[Saving(folder)])
    few = make_module(sampler=HistoricalPolicySampler(keep=2))
    with pytest.raises(InputError, match=r"holds 3 earlier policies, and model\.sampler\.init_args\.keep is 2"):
        resumed(few, folders[0] / "4.ckpt")
    with pytest.raises(InputError, match=r"HistoricalPolicySampler, but the checkpoint was made with PreviousPolicy"):
        resumed(make_module(sampler=HistoricalPolicySampler()), folders[1] / "2.ckpt")


def test_what_it_does_not_go_with_is_refused(make_module: MakeModule):
    for name in ("every", "keep"):
        with pytest.raises(InputError, match=rf"model\.sampler\.init_args\.{name} must be"):
            HistoricalPolicySampler(**{name: 0})
    with pytest.raises(InputError, match=r"model\.sampler=HistoricalPolicySampler has an earlier one write"):
        make_module(sampler=HistoricalPolicySampler(), rollout=VLLMRollout("http://localhost:1", weights="full"))
    with pytest.raises(InputError, match=r"model\.sampler=HistoricalPolicySampler acts through"):
        make_module(sampler=HistoricalPolicySampler()).sample(PROMPTS)


def test_memory_of_the_iterates_is_counted(make_module: MakeModule):
    counted = {}
    for keep in (1, 5):
        module = make_module(sampler=HistoricalPolicySampler(keep=keep))
        module.configure_model()
        module.sampler.begin(module.policy)
        counted[keep] = standing_memory(module, torch.optim.Adam(module.trained_parameters())).copies
    trained = sum(weight.numel() * weight.element_size() for weight in module.trained_parameters())
    assert counted == {1: trained, 5: 5 * trained}
