"""Replayed decoding steps: what they write is what is written without, and few of them are captured.

A CPU cannot capture: `replaying_on_a_cpu` takes the step again instead. `python tests/zoo --modes "float32 replayed"`
compares every family with the naive loop in that way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import (
    Captures,
    fit_quietly,
    make_tokenizer,
    noise,
    prompts_of,
    random_rows,
    randomize_adapters,
    replaying_on_a_cpu,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from xpo_lightning import Completions, LoRASpec, Sampling, XPOLightningModule
from xpo_lightning.models.forward.norms import norms_fused
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.rollout import opening, replay
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import writing_of

LoadModel = Callable[..., nn.Module]
ROWS = random_rows([4, 9, 2, 7, 1, 6], seed=1)


@pytest.fixture
def captures() -> Iterator[Captures]:
    """Let a CPU replay steps."""
    with replaying_on_a_cpu() as captures:
        yield captures


def roller(eos: list[int] | None = None, rows: int | None = None, **settings: Any) -> LocalRollout:
    return LocalRollout(make_tokenizer(), Sampling(**settings), eos or [], rows)


def same(one: Completions, other: Completions) -> None:
    """See that two rollouts wrote the same tokens."""
    assert one.ids.tolist() == other.ids.tolist()
    assert one.mask.tolist() == other.mask.tolist()
    assert one.ended.tolist() == other.ended.tolist()
    assert one.texts == other.texts
    torch.testing.assert_close(one.token_logps, other.token_logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos": list(range(0, 304, 12))},
        {"repetition_penalty": 1.7, "temperature": 0.0},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"eos": list(range(0, 304, 30)), "stop_strings": ["e", "th"]},
    ],
)
def test_replays_write_what_is_written_without(arch: str, settings: dict[str, Any], load_model: LoadModel):
    expected = roller(max_new_tokens=12, **settings)(load_model(arch), prompts_of(ROWS), noise())
    model = load_model(arch)
    with replaying_on_a_cpu() as captures:
        same(roller(max_new_tokens=12, **settings)(model, prompts_of(ROWS), noise()), expected)
        assert writing_of(model, 21).is_static
    assert captures.replayed > captures.captured > 0


def test_stop_string_that_the_last_token_completes_ends_its_row(captures: Captures, load_model: LoadModel):
    tokenizer = make_tokenizer()
    free = roller(max_new_tokens=5)(load_model(), prompts_of(ROWS), noise())
    stop = tokenizer.decode(free.ids[0, -1:])
    stopped = roller(max_new_tokens=5, stop_strings=[stop])(load_model(), prompts_of(ROWS), noise())
    assert captures.replayed > 0
    assert stopped.ids[0].tolist() == free.ids[0].tolist()
    assert stopped.ended[0]
    assert not free.ended[0]


def test_nothing_is_replayed_where_that_is_switched_off(captures: Captures, load_model: LoadModel):
    rollout = LocalRollout(make_tokenizer(), Sampling(max_new_tokens=4), [], replays=False)
    rollout(load_model(), prompts_of(ROWS), noise())
    assert captures.captured == 0


def test_several_batches_and_steps_capture_no_more_than_one(captures: Captures, load_model: LoadModel):
    model, rollout = load_model(), roller(max_new_tokens=10)
    for seed in range(3):
        rollout(model, prompts_of(random_rows([5, 3, 8], seed=seed)), noise(seed))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.01)
    assert captures.captured == 1
    assert captures.replayed == 1 + 3 * 9  # the first is compared with the step as it is


def test_replays_see_weights_that_were_changed_in_place(captures: Captures, load_model: LoadModel):
    model, other, rollout = load_model(), load_model(), roller(max_new_tokens=8)
    rollout(model, prompts_of(ROWS), noise())
    with torch.no_grad():
        for weight in (*model.parameters(), *other.parameters()):
            weight.mul_(0.7)
    expected = roller(max_new_tokens=8)(other, prompts_of(ROWS), noise())
    same(rollout(model, prompts_of(ROWS), noise()), expected)
    assert captures.captured == 2  # one for each model


def test_a_model_whose_weights_moved_is_captured_anew(captures: Captures, load_model: LoadModel):
    model, rollout = load_model(), roller(max_new_tokens=4)
    rollout(model, prompts_of(ROWS), noise())
    for weight in model.parameters():
        weight.data = weight.data.clone()
    rollout(model, prompts_of(ROWS), noise())
    assert captures.captured == 2


def test_adapters_on_and_off_are_steps_of_their_own(
    captures: Captures, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    adapted = get_peft_model(load_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize_adapters(adapted)
    rollout = roller(max_new_tokens=8)
    for _ in range(2):
        on = rollout(adapted, prompts_of(ROWS), noise())
        with adapted.disable_adapter():
            off = rollout(adapted, prompts_of(ROWS), noise())
    assert captures.captured == 2
    monkeypatch.setattr(opening, "REPLAYING", set())
    same(on, roller(max_new_tokens=8)(adapted, prompts_of(ROWS), noise()))
    same(off, roller(max_new_tokens=8)(load_model(), prompts_of(ROWS), noise()))


def test_converted_adapters_stay_where_they_are(load_model: LoadModel):
    adapted = get_peft_model(load_model(dtype=torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    places = []
    for _ in range(2):
        randomize_adapters(adapted)
        with torch.no_grad(), cast_lora_weights(adapted):
            places.append(replay.identity_of(adapted))
    assert places[0] == places[1]


def test_fewer_rows_are_computed_once_many_have_ended(captures: Captures, load_model: LoadModel):
    eos = list(range(0, 304, 8))
    prompts = prompts_of(random_rows([3] * 30, seed=2))
    written = roller(eos, max_new_tokens=40)(load_model(), prompts, noise())
    assert max(written.counts) > 17  # some went on beyond the second look
    assert captures.captured > 1


def test_a_session_that_gives_its_place_up_still_scores(captures: Captures, load_model: LoadModel):
    model, rollout, prompts = load_model().eval(), roller(max_new_tokens=6), prompts_of(ROWS)
    numbers = rollout.uniforms(prompts, noise())
    with torch.no_grad():
        read, (one,) = rollout.several(model, prompts, [numbers], None)
        rollout.several(model, prompts_of(random_rows([12, 2], seed=5)), [numbers[:2]], None)
        torch.testing.assert_close(read.logps(one), one.logps, atol=1e-4, rtol=0)
        same(rollout.sample(read.again(), numbers), one)


def test_a_step_that_cannot_be_captured_is_not(
    monkeypatch: pytest.MonkeyPatch, load_model: LoadModel, capsys: pytest.CaptureFixture[str]
):
    def refuse(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = roller(max_new_tokens=8)(load_model(), prompts_of(ROWS), noise())
    monkeypatch.setattr(opening, "REPLAYING", {"cpu"})
    monkeypatch.setattr(replay, "capture", refuse)
    said: list[str] = []
    monkeypatch.setattr(replay, "rank_zero_info", said.append)
    model, rollout = load_model(), roller(max_new_tokens=8)
    for _ in range(2):
        same(rollout(model, prompts_of(ROWS), noise()), expected)
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]


def test_a_replay_with_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch, load_model: LoadModel):
    def forgetful(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    expected = roller(max_new_tokens=8)(load_model(), prompts_of(ROWS), noise())
    monkeypatch.setattr(opening, "REPLAYING", {"cpu"})
    monkeypatch.setattr(replay, "capture", forgetful)
    same(roller(max_new_tokens=8)(load_model(), prompts_of(ROWS), noise()), expected)


@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)])
def test_training_takes_the_same_steps(
    captures: Captures,
    monkeypatch: pytest.MonkeyPatch,
    make_module: Callable[..., XPOLightningModule],
    lora: LoRASpec | None,
):
    def weights() -> dict[str, Any]:
        module = make_module(lora=lora, learning_rate=1e-2)
        fit_quietly(module, ["the cat", "a dog ran", "red", "sat on the mat"], batch_size=2, max_epochs=3)
        return {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}

    replayed = weights()
    captured = captures.captured
    monkeypatch.setattr(opening, "REPLAYING", set())
    for name, weight in weights().items():
        torch.testing.assert_close(replayed[name], weight, atol=1e-4, rtol=0)
    assert captured == 2  # the policy and the reference, each once in six steps
    assert captures.replayed > 6


def test_prompts_of_a_validation_do_not_close_the_buffers_to_training(captures: Captures, load_model: LoadModel):
    model, rollout = load_model(), roller(max_new_tokens=6)
    with torch.inference_mode():
        expected = rollout(model, prompts_of(ROWS), noise())
    same(rollout(model, prompts_of(ROWS), noise()), expected)


@pytest.mark.parametrize(("arch", "fused"), [("llama", 5), ("gemma2_sliding", 9), ("gpt2", 0), ("gpt_neox", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_the_root_mean_square_are_one_call(
    arch: str, fused: int, dtype: torch.dtype, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    model = load_model(arch, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.linspace(0.5, 2, weight.numel()))
    ids = torch.tensor(random_rows([12], seed=3))
    plain = model(input_ids=ids).logits.float()
    calls, own = [], nn.functional.rms_norm
    with norms_fused(model):
        monkeypatch.setattr(nn.functional, "rms_norm", lambda *args: calls.append(args) or own(*args))
        found = model(input_ids=ids).logits.float()
    assert len(calls) == fused
    truth = model.float()(input_ids=ids).logits
    assert (found - truth).abs().mean() <= 1.2 * (plain - truth).abs().mean() + 1e-5
