"""PILAF: the policy times exp(r) and exp(-r) write half of the pairs, and the policy the others."""

from collections.abc import Callable

import pytest
import torch
from conftest import PROMPTS, fit_quietly, noise
from test_mixture import logits_of
from test_samplers import Watch, collected, moved, rows_of

from xpo_lightning import (
    Candidates,
    Experience,
    InputError,
    PILAFSampler,
    ReferenceSampler,
    RolloutContext,
    Sampling,
    VLLMRollout,
    XPOLightningModule,
)
from xpo_lightning.data.prompts import as_prompts

MakeModule = Callable[..., XPOLightningModule]


def share_of(module: XPOLightningModule, pairs: Experience, side: str, row: int, shares: list[float]) -> list[float]:
    """Return the shares of the reference whose mixture, each row alone, gives what was said of the tokens."""
    prompt, completion = list(rows_of(pairs, side))[row]
    said = getattr(pairs.completions, side).token_logps[row]
    fitting = []
    for share in shares:
        logps = []
        for step, token in enumerate(completion):
            ours = logits_of(module.policy, [*prompt, *completion[:step]])
            with module.reference.lent() as reference:
                theirs = logits_of(reference, [*prompt, *completion[:step]])
            logps.append(float(((1 - share) * ours + share * theirs).log_softmax(0)[token]))
        if logps == pytest.approx(said[: len(logps)].tolist(), abs=1e-3):
            fitting.append(share)
    return fitting


def test_a_coin_a_prompt_decides_who_writes_both_sides(make_module: MakeModule):
    """The sampler's side is pi^(1 - beta) ref^beta where the policy's is pi^(1 + beta)/ref^beta."""
    module = moved(make_module(sampler=PILAFSampler(0.5), sampling=Sampling(max_new_tokens=4)))
    found = []
    for seed in range(3):
        pairs = collected(module, seed=seed)
        module.policy.eval()
        found += [
            [share_of(module, pairs, side, row, [-0.5, 0.0, 0.5]) for side in ("by_policy", "by_sampler")]
            for row in range(len(pairs))
        ]
    assert all(pair in ([[-0.5], [0.5]], [[0.0], [0.0]]) for pair in found), found
    assert 0.2 * len(found) < found.count([[0.0], [0.0]]) < 0.8 * len(found)


def test_each_prompt_has_its_own_share(make_module: MakeModule):
    """The longest prompt is first, which a session puts last: rows are those of a mixture with their share for all."""
    module = moved(make_module(sampler=PILAFSampler(), sampling=Sampling(max_new_tokens=8)))
    rows = as_prompts(sorted(PROMPTS, key=len, reverse=True), module.prompt_encoder, module.device)
    shares = torch.tensor([0.9 if row % 2 else -0.9 for row in range(len(rows))])
    kept = [None] * len(rows)
    with torch.no_grad():
        numbers = [module.collector.rollout.uniforms(rows, noise())]
        context = RolloutContext(
            module.collector.rollout, module.policy, module.reference.lent, rows, kept, module.timer
        )
        (mixed,) = context.generate_with_mixture(numbers, shares)
        towards, away = (context.generate_with_mixture(numbers, share)[0].texts for share in (0.9, -0.9))
    assert mixed.texts == tuple((towards if row % 2 else away)[row] for row in range(len(rows)))
    assert all(one != other for one, other in zip(towards, away, strict=True))


def test_each_of_several_candidates_is_a_sample_of_its_own(make_module: MakeModule):
    module = moved(make_module(sampler=PILAFSampler(0.3), candidates=Candidates(2, "best_of_each")))
    pairs = collected(module)
    assert pairs.completions.by_policy.texts != pairs.completions.by_sampler.texts


def test_it_trains_and_validation_compares_with_the_reference(make_module: MakeModule):
    watch = Watch()
    module = make_module(sampler=PILAFSampler(), learning_rate=0.03)
    fit_quietly(module, PROMPTS[:2] * 2, batch_size=2, callbacks=[watch])
    assert len(watch.sampled) == 2
    validated = collected(module, training=False)
    other = make_module(sampler=ReferenceSampler())
    other.configure_model()
    other.policy.load_state_dict(module.policy.state_dict())
    assert validated.completions.by_sampler.texts == collected(other, training=False).completions.by_sampler.texts


@pytest.mark.parametrize("beta", [0.0, -0.1, float("inf")])
def test_a_beta_out_of_range_is_refused(beta: float):
    with pytest.raises(InputError, match=r"model\.sampler\.init_args\.beta must be"):
        PILAFSampler(beta)


def test_what_it_does_not_go_with_is_refused(make_module: MakeModule):
    with pytest.raises(InputError, match=r"writes the policy's side of each pair, and so does model\.sampler=PILAF"):
        make_module(sampler=PILAFSampler(), rollout=VLLMRollout("http://localhost:1", weights="full"))
    with pytest.raises(InputError, match=r"model\.bonus_sampler=PILAFSampler writes both completions of a pair"):
        make_module(bonus_sampler=PILAFSampler())
