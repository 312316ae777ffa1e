"""A mixture of the policy and the reference writes the second completion."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPTS, ChainModel, chain_module, make_tokenizer, noise, replaying_on_a_cpu
from test_samplers import KINDS, collected, moved, rows_of
from torch import Tensor, nn

from xpo_lightning import (
    Candidates,
    Experience,
    InputError,
    LoRASpec,
    MixtureSampler,
    PolicySampler,
    ReferenceRefresh,
    RolloutContext,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.data.prompts import as_prompts

MakeModule = Callable[..., XPOLightningModule]


def logits_of(model: nn.Module, row: list[int]) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor([row])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].double()


def naive_mixture(ours: Tensor, theirs: Tensor, share: float, kind: str) -> Tensor:
    if kind == "geometric":
        return ((1 - share) * ours + share * theirs).log_softmax(0)
    return ((1 - share) * ours.softmax(0) + share * theirs.softmax(0)).log()


def check_rows(module: XPOLightningModule, pairs: Experience, share: float, kind: str, *, is_greedy: bool) -> None:
    """Score each token with both models, each row alone, and compare with what the sampler said of it."""
    module.policy.eval()
    side = pairs.completions.by_sampler
    for number, (prompt, completion) in enumerate(rows_of(pairs, "by_sampler")):
        for step, token in enumerate(completion):
            row = [*prompt, *completion[:step]]
            ours = logits_of(module.policy, row)
            with module.reference.lent() as reference:
                theirs = logits_of(reference, row)
            mixed = naive_mixture(ours, theirs, share, kind)
            assert float(side.token_logps[number, step]) == pytest.approx(float(mixed[token]), abs=1e-3)
            if is_greedy:
                assert float(mixed[token]) >= float(mixed.max()) - 1e-3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["geometric", "by_token"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_mixture(
    make_module: MakeModule, options: dict[str, Any], kind: Any, temperature: float
):
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    module = moved(make_module(sampler=MixtureSampler(0.3, kind), sampling=sampling, **options))
    pairs = collected(module)
    check_rows(module, pairs, 0.3, kind, is_greedy=temperature == 0)


def test_rows_that_end_at_different_times_stay_together(make_module: MakeModule):
    sampling = Sampling(max_new_tokens=8, eos_token_ids=list(range(0, 304, 4)))
    pairs = collected(module := moved(make_module(sampler=MixtureSampler(0.6), sampling=sampling)))
    assert len(set(pairs.completions.by_sampler.counts)) > 2
    check_rows(module, pairs, 0.6, "geometric", is_greedy=False)


def test_models_of_every_architecture_are_mixed(make_module: MakeModule, arch: str):
    module = moved(make_module(arch=arch, sampler=MixtureSampler(0.6)))
    check_rows(module, collected(module), 0.6, "geometric", is_greedy=False)


def test_a_refreshed_reference_is_mixed(make_module: MakeModule):
    module = make_module(sampler=MixtureSampler(0.5), reference_refresh=ReferenceRefresh(1))
    module.configure_model()
    moved(module, seed=5)
    module.reference.begin()
    moved(module, seed=7)
    check_rows(module, collected(module), 0.5, "geometric", is_greedy=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_a_refreshed_reference_are_its_own_in_a_mixture(make_module: MakeModule, dtype: str):
    """With all weight on the reference, its log-probabilities are those of the mixture."""
    options = {"lora": LoRASpec(r=4), "spec": {"dtype": dtype}, "reference_refresh": ReferenceRefresh(1)}
    module = make_module(sampler=MixtureSampler(1.0), **options)
    module.configure_model()
    moved(module, seed=5)
    module.reference.begin()
    moved(module, seed=7)
    pairs = collected(module)
    gaps = pairs.completions.by_sampler.logps - pairs.reference_logps.by_sampler
    assert float(gaps.abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["geometric", "by_token"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_writes_what_that_one_would(make_module: MakeModule, kind: Any, share: float):
    texts = []
    for sampler in (MixtureSampler(share, kind), None if share else PolicySampler()):
        pairs = collected(moved(make_module(sampler=sampler)))
        texts.append(pairs.completions.by_sampler.texts)
    assert texts[0] == texts[1]


def test_each_of_several_candidates_is_a_sample_of_its_own(make_module: MakeModule):
    module = moved(make_module(sampler=MixtureSampler(), candidates=Candidates(2, "best_of_each")))
    rollout, rng = module.collector.rollout, noise()
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    numbers = [rollout.uniforms(prompts, rng) for _ in range(2)]
    with torch.no_grad():
        nothing = [None] * len(prompts)
        context = RolloutContext(rollout, module.policy, module.reference.lent, prompts, nothing, module.timer)
        both = context.generate_with_mixture(numbers, 0.5)
        alone = [context.generate_with_mixture([one], 0.5)[0] for one in numbers]
    assert [some.texts for some in both] == [some.texts for some in alone]
    assert both[0].texts != both[1].texts


def test_a_device_that_replays_steps_mixes_the_same(make_module: MakeModule):
    plain = collected(moved(make_module(sampler=MixtureSampler())))
    with replaying_on_a_cpu():
        replayed = collected(moved(make_module(sampler=MixtureSampler())))
    assert plain.completions.by_sampler.texts == replayed.completions.by_sampler.texts


def test_models_without_a_cache_are_mixed():
    tokenizer = make_tokenizer()
    module = chain_module(
        ChainModel({}, 5), tokenizer, sampler=MixtureSampler(0.25), sampling=Sampling(max_new_tokens=3)
    )
    module.configure_model()
    with torch.no_grad():
        module.policy.table.weight.copy_(torch.randn(module.policy.table.weight.shape))
    check_rows(module, collected(module), 0.25, "geometric", is_greedy=False)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float):
    with pytest.raises(InputError, match=r"model\.sampler\.init_args\.reference_share must be"):
        MixtureSampler(share)
