"""The fast path: the same numbers as the plain one, taken wherever it can be, and every phase there."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import (
    CONFIGS,
    PROMPTS,
    VOCABULARY,
    ChainModel,
    Recorder,
    completions_of,
    fit_quietly,
    make_tokenizer,
    noise,
    prompts_of,
    random_rows,
    randomize_adapters,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from xpo_lightning import Pair, Sampling, SequenceClassifierReward, XPOLightningModule
from xpo_lightning.core.timer import Phase
from xpo_lightning.models import logprobs as logps_module
from xpo_lightning.models.forward import norms
from xpo_lightning.models.forward.capabilities import (
    Sharing,
    capabilities_of,
    refuse_untrainable,
    rows_of,
    sharing_of,
    without_fast_paths,
)
from xpo_lightning.models.forward.cpu import speed_up_linears
from xpo_lightning.models.forward.unshared import Rows
from xpo_lightning.models.logprobs import pair_logps, shares_prompt
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.models.policy import LoRASpec
from xpo_lightning.rewards.sequence_classifier import reward as classifier_module
from xpo_lightning.rewards.sequence_classifier.capabilities import ScoringCapabilities
from xpo_lightning.rewards.sequence_classifier.scoring import find_prefix_pairs, score_prefix_pairs, score_rows
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import writing_of
from xpo_lightning.rollout.plain_session import PlainSession
from xpo_lightning.rollout.session import Session
from xpo_lightning.rollout.writing import Writing

LoadModel = Callable[..., nn.Module]
PROMPT_ROWS = random_rows([6, 3, 9, 1, 7], seed=1)
MANY_ROWS = random_rows([6, 3, 9, 1, 7, 2, 5, 8, 4, 10, 3, 6], seed=4)
PAIR = Pair(
    completions_of(random_rows([5, 8, 1, 6, 3], seed=2)),
    completions_of(random_rows([2, 4, 9, 3, 5], seed=3)),
)


def logps_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps = pair_logps(model, prompts_of(PROMPT_ROWS), PAIR)
    (2 * logps.by_policy - logps.by_sampler).sum().backward()
    both = torch.cat([logps.by_policy, logps.by_sampler]).detach()
    return both, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what is found out about a model ----


def test_each_architecture_takes_the_path_that_suits_it(arch: str, load_model: LoadModel):
    """Gemma 2 caps its logits after the head; a sliding window counts padding as if it were text."""
    model = load_model(arch)
    assert capabilities_of(model).head is (None if arch == "gemma2_sliding" else model.get_output_embeddings())
    assert sharing_of(model, 20) is (Sharing.PADDED_LEFT if arch.endswith("sliding") else Sharing.PADDED_RIGHT)
    way = writing_of(model, 20)
    assert way.is_shared
    assert way.rows is (Rows.PADDED_LEFT if arch.endswith("sliding") else Rows.PADDED_RIGHT)
    with without_fast_paths(model):
        assert writing_of(model, 20) == Writing(Rows.PADDED_LEFT)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_a_first_use_in_validation_finds_the_same(load_model: LoadModel, inference: bool):
    model = load_model()
    with torch.inference_mode(inference), torch.no_grad():
        assert sharing_of(model, 20) is Sharing.PADDED_RIGHT


def test_a_model_that_names_no_head_keeps_its_own():
    """`ChainModel` hands out logits from a table."""
    model = ChainModel({3: 4}, otherwise=5)
    assert capabilities_of(model).head is None


def test_scaled_logits_are_not_taken_for_those_of_the_head(load_model: LoadModel):
    model = load_model()
    forward = model.forward

    def doubled(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    assert capabilities_of(model).head is None


def test_gradient_checkpointing_takes_the_plain_path_in_training_alone(load_model: LoadModel):
    model = load_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert shares_prompt(model, 20) is Sharing.PADDED_RIGHT
    assert shares_prompt(model.train(), 20) is Sharing.NOT
    with torch.no_grad():
        assert shares_prompt(model, 20) is Sharing.PADDED_RIGHT


# ---- the same numbers ----


def test_logps_and_gradients_equal_those_of_the_plain_path(arch: str, load_model: LoadModel):
    """Within 2e-5 nats a completion and 1e-5 of a weight's largest gradient, in float32."""
    model = load_model(arch)
    speed_up_linears(model)
    fast, fast_gradients = logps_and_gradients(model)
    with without_fast_paths(model):
        assert sharing_of(model, 20) is Sharing.NOT
        plain, plain_gradients = logps_and_gradients(model)
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("rows_at_once", [None, 2])
def test_rollouts_equal_those_of_a_plain_session(arch: str, load_model: LoadModel, rows_at_once: int | None):
    """With many EOS ids rows leave the batch at different times; each row keeps its own randomness."""
    model, prompts = load_model(arch), prompts_of(MANY_ROWS)
    roll = LocalRollout(make_tokenizer(), Sampling(max_new_tokens=12), list(range(0, VOCABULARY, 3)), rows_at_once)
    fast = roll(model, prompts, noise())
    with without_fast_paths(model):
        assert isinstance(roll.open(model, prompts), PlainSession)
        plain = roll(model, prompts, noise())
    assert len(set(fast.counts)) > 2
    assert torch.equal(fast.ids, plain.ids)
    assert torch.equal(fast.ended, plain.ended)
    torch.testing.assert_close(fast.token_logps, plain.token_logps, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [8, 4096], ids=["a_few_tokens_at_once", "all_at_once"])
def test_scores_of_a_session_equal_fresh_ones_after_rows_have_moved(arch: str, load_model: LoadModel, at_once: int):
    model, prompts, rows = load_model(arch), prompts_of(MANY_ROWS), len(MANY_ROWS)
    roll = LocalRollout(make_tokenizer(), Sampling(max_new_tokens=9), list(range(0, VOCABULARY, 3)))
    session = Session(model, prompts, 9, at_once, writing_of(model, 20))
    roll.sample(session, roll.uniforms(prompts, noise()))
    assert session.places.tolist() != sorted(range(rows), key=lambda row: len(MANY_ROWS[row]))
    session.rest()
    side = completions_of(random_rows([1 + 5 * row % 9 for row in range(rows)], seed=5))
    expected = pair_logps(model, prompts, Pair(side, side)).by_policy
    for _ in range(2):  # nothing is spoiled by scoring
        torch.testing.assert_close(session.logps(side), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", [{}, {"gradient_checkpointing": True}], ids=["plain", "gradient_checkpointing"])
@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)], ids=["full", "lora"])
def test_a_training_step_equals_that_of_the_plain_path(
    make_module: Callable[..., XPOLightningModule], spec: dict[str, Any], lora: LoRASpec | None
):
    weights = []
    for plain in (False, True):
        torch.manual_seed(0)
        module = make_module(learning_rate=1e-2, spec=spec, lora=lora)
        module.configure_model()
        if plain:
            with without_fast_paths(module.policy), without_fast_paths(module.reference.frozen or module.policy):
                fit_quietly(module, PROMPTS, max_steps=1)
        else:
            fit_quietly(module, PROMPTS, max_steps=1)
        weights.append([weight.detach().clone() for weight in module.trained_parameters()])
    for fast, slow in zip(*weights, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=2e-4)


@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)], ids=["full", "lora"])
def test_norms_as_one_kernel_give_the_same_step(
    make_module: Callable[..., XPOLightningModule],
    tmp_path: Path,
    lora: LoRASpec | None,
    monkeypatch: pytest.MonkeyPatch,
):
    """As on a GPU: in rollouts, scores, and the gradient; layers that are computed again find the norms they had."""
    calls, own = [], torch.nn.functional.rms_norm
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda *args: calls.append(args[0].requires_grad) or own(*args)
    )
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_labels=1, bos_token_id=None, eos_token_id=None)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    def stepped(fusing: set[str], **spec: Any) -> tuple[list[bool], list[Tensor]]:
        monkeypatch.setattr(norms, "FUSING", fusing)
        calls.clear()
        torch.manual_seed(0)
        reward, sgd = SequenceClassifierReward(str(tmp_path)), partial(torch.optim.SGD, lr=1.0)
        module = make_module(reward=reward, lora=lora, optimizer=sgd, max_grad_norm=None, spec=spec)
        fit_quietly(module, PROMPTS, max_steps=1)
        return list(calls), [weight.detach() for weight in module.trained_parameters()]

    unfused, expected = stepped(set())
    fused, found = stepped({"cpu"})
    assert not unfused
    assert any(fused)
    assert not all(fused)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    _, again = stepped({"cpu"}, gradient_checkpointing=True)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("float16", "32-true"),
        ("bfloat16", "32-true"),
        ("bfloat16", "bf16-mixed"),
        ("float32", "32-true"),
        ("float32", "bf16-mixed"),
    ],
)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("llama", "gemma2_sliding"))) for name in CONFIGS],
)
def test_a_step_runs_in_every_type_of_weights(
    make_module: Callable[..., XPOLightningModule], arch: str, dtype: str, precision: str
):
    """An untrained policy is its own reference, so both give its completions the same log-probabilities."""
    module = make_module(arch, spec={"dtype": dtype})
    recorder = Recorder()
    fit_quietly(module, PROMPTS, max_steps=1, precision=precision, callbacks=[recorder])
    exact = (dtype, precision) == ("float32", "32-true")
    assert recorder.of("objective/kl") == pytest.approx([0], abs=1e-4 if exact else 0.5)


@pytest.mark.parametrize("tokens", [None, 40, 1])
@pytest.mark.parametrize("size", [8, 2])
def test_micro_batches_by_tokens_give_the_same_step(
    make_module: Callable[..., XPOLightningModule], tokens: int | None, size: int
):
    def stepped(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        # Adam would turn rounding errors of a gradient near 0 into steps of either sign.
        module = make_module(optimizer=partial(torch.optim.SGD, lr=1.0), max_grad_norm=None, **options)
        fit_quietly(module, PROMPTS, max_steps=1)
        return [weight.detach() for weight in module.trained_parameters()]

    for one, other in zip(stepped(), stepped(micro_batch_tokens=tokens, micro_batch_size=size), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_logps_are_as_close_to_float32_as_transformers_own(load_model: LoadModel):
    """Root mean square over 80 completions of up to 9 tokens, against the same weights in float32."""
    lengths = [count % 9 + 1 for count in range(40)]
    rows = random_rows(lengths, seed=1)
    pair = Pair(
        completions_of(random_rows(lengths[::-1], seed=2)), completions_of(random_rows(lengths[5:] + lengths[:5], 3))
    )
    model = load_model().bfloat16()
    exact = load_model()
    exact.load_state_dict(model.state_dict())
    expected = pair_logps(exact, prompts_of(rows), pair)
    errors = []
    for logps in (pair_logps(model, prompts_of(rows), pair), pair.map(partial(_plain_transformers, model, rows))):
        gaps = torch.cat([logps.by_policy - expected.by_policy, logps.by_sampler - expected.by_sampler])
        errors.append(gaps.square().mean().sqrt().item())
    assert errors[0] < 1.5 * errors[1], "0.9 to 1.3 times with six draws of such rows"


def _plain_transformers(model: nn.Module, rows: list[list[int]], side: Any) -> Tensor:
    """Score each row alone with transformers' own forward and attention."""
    sums = []
    for prompt, ids, count in zip(rows, side.ids.tolist(), side.counts, strict=True):
        completion = ids[:count]
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.float().log_softmax(-1)[range(count), completion].sum())
    return torch.stack(sums)


# ---- adapters ----


def test_adapters_of_a_bfloat16_model_are_converted_for_a_while_and_learn_in_float32(
    load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    """The numbers are as close to those of a float32 model as with peft's own conversions at every layer."""
    model = LoRASpec(r=4).wrap(load_model().bfloat16())
    randomize_adapters(model)
    adapters = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    with cast_lora_weights(model):
        inside = {name: weight.dtype for name, weight in model.named_parameters() if "lora_" in name}
        assert set(inside.values()) == {torch.bfloat16}
    assert all(weight is adapters[name] for name, weight in model.named_parameters() if "lora_" in name)
    fast, gradients = logps_and_gradients(model)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    exact = LoRASpec(r=4).wrap(load_model())
    exact.load_state_dict(model.state_dict())
    expected, expected_gradients = logps_and_gradients(exact)
    monkeypatch.setattr(logps_module, "cast_lora_weights", lambda _: nullcontext())
    pefts, pefts_gradients = logps_and_gradients(model)
    assert not torch.equal(fast, pefts)
    assert (fast - expected).norm() < 1.5 * (pefts - expected).norm()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() < 2 * (pefts_gradients[name] - gradient).norm(), name


# ---- rewards ----


def classifier(arch: str) -> nn.Module:
    bert = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    config = bert if arch == "bert" else CONFIGS[arch]()
    config.num_labels, config.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt2", "qwen2"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_scores_of_twins_equal_those_of_single_rows(arch: str, micro_batch_size: int):
    model = classifier(arch)
    assert ScoringCapabilities(model).shares(60)
    begins = random_rows([20, 17, 30])
    rows = [
        begin + end for seed in (1, 2) for begin, end in zip(begins, random_rows([3, 9, 1], seed=seed), strict=True)
    ]
    twins, single = find_prefix_pairs(rows, ["a", "b", "c"] * 2)
    assert sorted(twins) == [(0, 3, 20), (1, 4, 17), (2, 5, 30)]
    assert single == []
    scores = score_prefix_pairs(model, rows, twins, micro_batch_size, [0])
    places = [twin[side] for side in (0, 1) for twin in twins]
    torch.testing.assert_close(scores, score_rows(model, rows, 1, [0])[places], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["bert", "mistral_sliding", "gemma2_sliding"])
def test_a_classifier_that_cannot_share_is_found_out(arch: str):
    """An encoder's prompt sees the completion; a sliding window would count padding."""
    assert not ScoringCapabilities(classifier(arch)).shares(60)


def test_rows_that_share_little_are_scored_by_themselves():
    rows = [[1, 2, 3], [1, 2, 4], list(range(20)), list(range(20)), list(range(20, 40)), [7]]
    assert find_prefix_pairs(rows, ["a", "a", "b", "b", "c", "c"]) == ([(2, 3, 19)], [0, 1, 4, 5])


# ---- nothing is left out, and the fast path is taken ----

PHASES = get_args(Phase)


@pytest.fixture
def reward_folder(tmp_path: Any) -> str:
    folder = str(tmp_path / "reward")
    classifier("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_a_step_reads_each_prompt_as_often_as_it_must(
    make_module: Callable[..., XPOLightningModule], reward_folder: str, arch: str, monkeypatch: pytest.MonkeyPatch
):
    """Six prompts, in micro-batches of two: every phase is there, and no model runs over a prompt twice.

    Positions are counted at the first layer of each model, padding included. The policy reads the prompts to sample and
    once more for the gradient, the reference once for both, and the reward once for both completions.
    """
    prompts = ["the cat sat on the mat and the dog ran away from"] * 2 + [
        "a dog ran away from the red hat and the cat"
    ] * 4
    module = make_module(
        arch,
        reward=SequenceClassifierReward(reward_folder),
        sampling=Sampling(max_new_tokens=6, eos_token_ids=[]),
        micro_batch_size=2,
    )
    module.configure_model()
    counted = {
        "policy": module.policy,
        "reference": module.reference.frozen,
        "reward": module.reward.model,
    }
    for model in (module.policy, module.reference.frozen):
        assert sharing_of(model, 20) is not Sharing.NOT  # examined before the counting
        writing_of(model, 20)
    refuse_untrainable(module.policy)
    module.reward.score(["x" * 60] * 2, ["one", "two"], {})
    found: list[Any] = []

    def finding(rows: Any, prompts: Any) -> Any:
        twins, single = find_prefix_pairs(rows, prompts)
        found.extend([(rows, twins), (single,)])
        return twins, single

    monkeypatch.setattr(classifier_module, "find_prefix_pairs", finding)
    positions = dict.fromkeys(counted, 0)

    def counting(name: str) -> Callable[..., None]:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            positions[name] += inputs[0].shape[0] * inputs[0].shape[1]

        return count

    for name, model in counted.items():
        layers = next(child for child in model.modules() if isinstance(child, nn.ModuleList))
        layers[0].register_forward_pre_hook(counting(name))
    fit_quietly(module, prompts, max_steps=1)
    lengths = [len(module.prompt_encoder(prompt)) for prompt in prompts]
    total, rows, new = sum(lengths), len(prompts), 6
    assert len(set(lengths)) <= 2
    padded = rows * max(lengths)
    assert {phase: module.timer.counts[phase] for phase in PHASES} == {
        **dict.fromkeys(PHASES, 1),
        "policy_forward": 3,
        "backward": 3,
        "optimizer": 2,  # clipping, and the step once all processes have agreed on it
    }
    # The last token of a completion is never an input: T - 1 = 5 positions a completion.
    assert rows * 5 + total + 2 * rows * 5 + total <= positions["policy"] <= 3 * rows * 5 + 2 * padded
    assert rows * 5 + rows * (new - 1) + total <= positions["reference"] <= 2 * rows * 5 + padded
    (texts, twins), (single, *_) = found
    ends = [len(texts[twin[side]]) - twin[2] for side in (0, 1) for twin in twins]
    assert (len(twins), single) == (rows, [])
    assert positions["reward"] == rows * max(twin[2] for twin in twins) + 2 * rows * max(ends)


def test_the_plain_path_would_fail_the_count_above(load_model: LoadModel):
    """The guard's own check: computed the plain way, each prompt passes the policy twice for its two completions."""
    model = load_model()
    positions: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0][..., 0].numel()))
    sharing_of(model, 20)
    positions.clear()
    pair_logps(model, prompts_of(PROMPT_ROWS), PAIR)
    assert sum(positions) == 5 * 9 + 2 * 5 * 8
    with without_fast_paths(model):
        rows_of(model, 20)
        positions.clear()
        pair_logps(model, prompts_of(PROMPT_ROWS), PAIR)
    assert sum(positions) == 2 * 5 * (9 + 8)


def test_a_saved_model_knows_nothing_of_the_layers_that_were_swapped(load_model: LoadModel, tmp_path: Any):
    model = load_model()
    speed_up_linears(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(module) for module in again.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
