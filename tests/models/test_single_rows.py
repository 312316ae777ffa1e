"""Numbers of rows in a batch are those of each row alone, whatever the model: over windows, marks and states."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    GROUPED,
    PROMPTS,
    ROPE,
    VOCABULARY,
    Recorder,
    chain_module,
    completions_of,
    fit_quietly,
    make_tokenizer,
    naive_token_logps,
    noise,
    prompts_of,
    random_rows,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from xpo_lightning import InputError, LocalJudge, Pair, Sampling, SequenceClassifierReward
from xpo_lightning.models.forward.ladder import Ladder
from xpo_lightning.models.logprobs import pair_logps
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import writing_of
from xpo_lightning.rollout.writing import Memory

LONG = [300, 200, 40, 260, 120]  # tokens; GPT-Neo's published window is 256
LONGROPE = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=256,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "longrope": lambda: transformers.Phi3Config(**{**GROUPED, **LONGROPE}),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=None
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, bos_token_id=None, eos_token_id=None
    ),
}


def loud(model: nn.Module) -> nn.Module:
    """Give matrices weights that are large enough for a model's context to matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2, generator=generator)
    return model.eval()


def build(kind: str) -> nn.Module:
    return loud(AutoModelForCausalLM.from_config(CONFIGS[kind]()))


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("gpt_neo", LONG),
        ("longrope", [70, 20, 58, 40, 100]),
        ("longrope", [58, 20, 40]),
        ("longrope", [30, 20, 10]),
        ("mamba", [9, 30, 2, 9]),
    ],
    ids=["window", "across a mark", "across a mark by their completions alone", "below a mark", "state"],
)
def test_scores_samples_and_gradients_are_those_of_each_row_alone(kind: str, lengths: Sequence[int]):
    """Within 1e-4 nats a completion, and 1e-4 of the largest gradient of a weight, in float32."""
    model = build(kind)
    naive = copy.deepcopy(model)
    rows = random_rows(lengths, seed=1)
    prompts, rollout = prompts_of(rows), LocalRollout(make_tokenizer(), Sampling(max_new_tokens=12), [3, 4])
    own, other = rollout(model, prompts, noise(1)), rollout(model, prompts, noise(2))
    total = torch.zeros(())
    for sign, side, logps in zip((1, -2), (own, other), pair_sums(model, prompts, own, other), strict=True):
        for place, row in enumerate(rows):
            completion = side.ids[place][side.mask[place]].tolist()
            expected = sum(naive_token_logps(naive, row, completion))
            assert float(side.logps[place]) == pytest.approx(expected, abs=1e-4)
            assert float(logps[place]) == pytest.approx(expected, abs=1e-4)
            logits = naive(input_ids=torch.tensor([[*row, *completion]])).logits[0, len(row) - 1 : -1]
            total = total + sign * logits.log_softmax(-1)[range(len(completion)), completion].sum()
    total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        if theirs.grad is not None:
            largest = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * largest + 1e-9, msg=name)


def test_rows_beyond_a_mark_are_read_again_at_the_mark_alone():
    ways = [writing_of(build("longrope"), length) for length in (60, 90)]
    assert [(way.is_shared, way.memory) for way in ways] == [(True, Memory.KEYS_AND_VALUES), (False, Memory.READ_AGAIN)]


def test_session_of_rows_in_any_order_samples_and_scores_each_row_alone():
    """Rows of one length are computed together wherever they stand; scores are sums over tokens."""
    model, rows = build("mamba"), random_rows([9, 30, 2, 9], seed=1)
    prompts, rollout = prompts_of(rows), LocalRollout(make_tokenizer(), Sampling(max_new_tokens=3, temperature=0.0), [])
    with torch.no_grad():
        session = rollout.open(model, prompts)
        written = rollout.sample(session, torch.zeros(4, 3, dtype=torch.float64))
        scores = session.logps(written)
        for row, ids, score in zip(rows, written.ids.tolist(), scores.tolist(), strict=True):
            for place in range(3):
                assert ids[place] == int(model(torch.tensor([[*row, *ids[:place]]])).logits[0, -1].argmax())
            assert score == pytest.approx(sum(naive_token_logps(model, row, ids)), abs=1e-4)


def pair_sums(model: nn.Module, prompts: Any, own: Any, other: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Score both sides, and let gradients of the first less twice the second flow."""
    logps = pair_logps(model, prompts, Pair(own, other))
    (logps.by_policy - 2 * logps.by_sampler).sum().backward()
    return logps.by_policy.detach(), logps.by_sampler.detach()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_an_untrained_policy_with_a_state_is_its_own_reference(kind: str):
    """Sampled without its state, a policy is far from a reference that is scored with it."""
    module = chain_module(build(kind), make_tokenizer(), sampling=Sampling(max_new_tokens=8))  # type: ignore[arg-type]
    recorder = Recorder()
    fit_quietly(module, PROMPTS, max_steps=1, callbacks=[recorder])
    assert abs(recorder.of("objective/kl")[0]) <= 1e-4 + recorder.of("objective/kl_stderr")[0]
    assert recorder.of("objective/kl") == pytest.approx([0], abs=1e-4)
    assert recorder.of("loss/dpo") == pytest.approx([math.log(2)], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (CONFIGS["gpt_neo"], [300, 200, 40, 260, 120]),
        (CONFIGS["longrope"], [70, 20, 58, 40, 100]),
        (lambda: transformers.MistralConfig(**{**GROUPED, "max_position_embeddings": 256}, sliding_window=8), [9, 60]),
    ],
    ids=["gpt_neo", "longrope", "sliding window"],
)
def test_a_reward_does_not_depend_on_the_rows_beside_it(
    config: Callable[[], transformers.PreTrainedConfig], lengths: Sequence[int], tmp_path: Path
):
    """Two completions of each prompt, which are scored together where the model allows it."""
    settings = config()
    settings.num_labels, settings.pad_token_id = 1, 0
    loud(AutoModelForSequenceClassification.from_config(settings)).save_pretrained(tmp_path)
    make_tokenizer("no_pad").save_pretrained(tmp_path)
    reward = SequenceClassifierReward(str(tmp_path))
    reward.load()
    letters = "abcdefgh"
    prompts = ["".join(letters[n * n % 7 + n % 2] for n in range(length)) for length in lengths] * 2
    texts = ["cat", "a dog", "red hat today", "mat", "ran"][: len(lengths)] + ["x", "yes", "no", "q", "k"][
        : len(lengths)
    ]
    together = reward.score(prompts, texts, {})
    alone = [float(reward.score([prompt], [text], {})) for prompt, text in zip(prompts, texts, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)
    assert len({round(score, 3) for score in alone}) > len(lengths)


def test_a_judge_does_not_depend_on_the_questions_beside_it(tmp_path: Path):
    """RWKV has no mask, so that padding on the left would be read as text."""
    build("rwkv").save_pretrained(tmp_path)
    make_tokenizer("no_pad").save_pretrained(tmp_path)
    judge = LocalJudge(str(tmp_path), template="{prompt} {first} or {second}?")
    judge.load()
    prompts, first, second = ["the cat", "a dog ran away", "red"], ["sat", "ran", "on the mat"], ["x", "y", "z"]
    together = judge.compare(prompts, first, second, {}).tolist()
    alone = [float(judge.compare(*([side[row]] for side in (prompts, first, second)), {})) for row in range(3)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 3


def test_a_model_that_sees_what_it_predicts_is_refused_before_the_first_step():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = loud(transformers.BertLMHeadModel(config))
    module = chain_module(model, make_tokenizer(), sampling=Sampling(max_new_tokens=4))  # type: ignore[arg-type]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(InputError, match="BertLMHeadModel is no causal language model"):
        fit_quietly(module, PROMPTS, max_steps=1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_was_found_out_of_a_model_leaves_it_as_it_was():
    """Weights, modes, gradients' switches and random numbers; in bfloat16 weights are put aside for a while."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**ROPE)).bfloat16().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state, rows = torch.get_rng_state(), random_rows([5, 9], seed=1)
    own = completions_of(random_rows([3, 4], seed=2))
    pair_logps(model, prompts_of(rows), Pair(own, own))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert len(model.model.layers) == 2


# ---- which way is taken ----


def tried(limits: dict[str, int], marks: Sequence[int] = ()) -> tuple[Ladder[str], list[tuple[str, int]]]:
    """Make a ladder whose ways are right up to a length, and a list of what it tries."""
    calls: list[tuple[str, int]] = []

    def fault(way: str, reach: int) -> str | None:
        calls.append((way, reach))
        return None if reach <= limits[way] else "too long"

    return Ladder("test", list(limits), fault, 1000, marks), calls


def test_the_fastest_way_is_taken_as_far_as_it_is_right():
    """The fast way is right up to the mark of 100, where it ends and the next one begins."""
    ladder, calls = tried({"fast": 100, "slow": 1000, "slowest": 1000}, marks=[20, 100, 500])
    ladder.extend(48)
    assert [ladder.way(length) for length in (5, 48)] == ["fast", "fast"]
    assert calls == [("fast", 48)]
    assert [ladder.way(length) for length in (130, 100, 101, 999)] == ["slow", "fast", "slow", "slow"]


def test_a_way_that_fails_at_no_mark_is_given_up_from_where_it_was_tried():
    ladder, _ = tried({"fast": 70, "slow": 1000})
    ladder.extend(48)
    assert [ladder.way(length) for length in (60, 48, 49)] == ["slow", "fast", "slow"]


def test_the_last_way_is_taken_untried():
    ladder, calls = tried({"fast": 0, "last": 0})
    ladder.extend(48)
    assert ladder.way(900) == "last"
    assert {way for way, _ in calls} == {"fast"}
