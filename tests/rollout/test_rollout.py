"""Rollouts: greedy ones equal those of transformers, rows do not depend on each other, and models stay as they were."""

import pytest
import torch
from conftest import VOCABULARY, make_tokenizer, naive_token_logps, prompts_of, randomize_adapters
from peft import LoraConfig, get_peft_model
from rolling import PROMPT_ROWS, LoadModel, an_early_end, assert_logps_are_the_models_own, generated, roll, rows_of
from torch import Tensor, nn

from xpo_lightning.rollout import local as local_module
from xpo_lightning.rollout.kv_cache import RolloutCache
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import writing_of
from xpo_lightning.rollout.sampling import Sampling, TokenSampler


def test_greedy_equals_transformers_generate(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    for eos in ([], [an_early_end(model, prompts)]):
        ours = roll(model, prompts, eos, max_new_tokens=14, temperature=0.0)
        assert rows_of(ours) == generated(model, prompts, eos, 14)
    assert len(rows_of(ours)[0]) <= 4


def test_all_that_a_row_has_written_is_penalised_as_transformers_does_it(load_model: LoadModel):
    ours = rows_of(
        roll(load_model(), prompts_of(PROMPT_ROWS), max_new_tokens=14, temperature=0.0, repetition_penalty=2.0)
    )
    for row, written in zip(PROMPT_ROWS, ours, strict=True):
        assert [written] == generated(load_model(), prompts_of([row]), [], 14, repetition_penalty=2.0)
        assert len(set(written)) > 2


def test_greedy_in_train_mode_with_gradient_checkpointing_equals_transformers_in_eval_mode(
    arch: str, load_model: LoadModel
):
    prompts, trained = prompts_of(PROMPT_ROWS), load_model(arch)
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained.train()
    ours = roll(trained, prompts, max_new_tokens=14, temperature=0.0)
    assert rows_of(ours) == generated(load_model(arch), prompts, [], 14)
    assert all(module.training for module in trained.modules())


def test_rollout_leaves_every_submodule_in_its_own_mode(load_model: LoadModel):
    model = load_model("gpt2").train()
    for module in list(model.modules())[::3]:
        module.training = False
    before = [module.training for module in model.modules()]
    roll(model, prompts_of(PROMPT_ROWS), max_new_tokens=3)
    assert {True, False} == set(before)
    assert [module.training for module in model.modules()] == before


def test_rollout_restores_modes_when_the_model_fails(load_model: LoadModel):
    model = load_model().train()
    with pytest.raises(IndexError):
        roll(model, prompts_of([[VOCABULARY + 5]]), max_new_tokens=3)
    assert all(module.training for module in model.modules())


def test_rollout_makes_no_gradients(load_model: LoadModel):
    completions = roll(load_model().train(), prompts_of(PROMPT_ROWS), max_new_tokens=2)
    assert not completions.token_logps.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_greedy_with_lora_equals_transformers_on_the_merged_model(load_model: LoadModel, checkpointing: bool):
    prompts = prompts_of(PROMPT_ROWS)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    adapted = get_peft_model(load_model(), config)
    randomize_adapters(adapted)
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    ours = rows_of(roll(adapted, prompts, max_new_tokens=12, temperature=0.0))
    merged = adapted.eval().merge_and_unload()
    assert ours == generated(merged, prompts, [], 12)
    assert ours != generated(load_model(), prompts, [], 12)


# ---- groups of rows, randomness, cache ----


def test_bfloat16_cache_that_is_read_whole_hides_what_is_not_written(
    arch: str, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    """As on a processor that is fast at bfloat16. Buffers grow by 8 columns, and rows leave them as they end.

    Rounding alone, with attention in float32, is 0.03 of a nat; a step that sees a column too many is off by 0.6.
    """
    monkeypatch.setattr("xpo_lightning.models.forward.cpu.prefers_onednn", lambda: True)
    monkeypatch.setattr("xpo_lightning.models.forward.cpu_attention.prefers_onednn", lambda: True)
    monkeypatch.setattr("xpo_lightning.rollout.kv_cache.COLUMNS", 8)
    read: list[tuple[int, int]] = []
    columns_read = RolloutCache.columns_read
    monkeypatch.setattr(
        RolloutCache,
        "columns_read",
        lambda cache, end: read.append((end, columns_read(cache, end))) or read[-1][1],
    )
    model, prompts = load_model(arch, dtype=torch.bfloat16), prompts_of(PROMPT_ROWS)
    completions = roll(model, prompts, list(range(0, VOCABULARY, 12)), max_new_tokens=14)
    assert set(completions.counts) != {14}
    exact = model.float()
    errors = [
        completions.token_logps[row, : len(completion)] - torch.tensor(naive_token_logps(exact, prompt, completion))
        for row, (prompt, completion) in enumerate(zip(PROMPT_ROWS, rows_of(completions), strict=True))
    ]
    assert torch.cat(errors).square().mean().sqrt() < 0.05
    is_whole = model.config._attn_implementation == "sdpa"  # others attend by themselves
    assert is_whole == ({(10, 16), (16, 16), (17, 23)} <= set(read)), "9 prompt tokens and at most 14 new ones"


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 100])
def test_rows_at_once_keeps_the_order_of_the_rows(load_model: LoadModel, rows: int):
    model, prompts = load_model(), prompts_of(PROMPT_ROWS)
    eos = [an_early_end(model, prompts)]
    whole = roll(model, prompts, eos, max_new_tokens=9, temperature=0.0)
    grouped = roll(model, prompts, eos, rows, max_new_tokens=9, temperature=0.0)
    assert rows_of(grouped) == rows_of(whole)
    assert grouped.texts == whole.texts
    assert torch.equal(grouped.ended, whole.ended)
    sampled = roll(model, prompts, [], rows, max_new_tokens=5)
    assert rows_of(sampled) == rows_of(roll(model, prompts, [], max_new_tokens=5)), "each row has its own numbers"
    assert_logps_are_the_models_own(model, prompts, sampled)


def test_more_rows_are_decoded_together_where_prompts_are_short(monkeypatch: pytest.MonkeyPatch, load_model: LoadModel):
    """With room for 60 columns: 3 rows of 10 + 10, then 5 of 2 + 10."""
    monkeypatch.setattr(local_module, "most_rows", lambda _, width: 60 // width)
    prompts = prompts_of([[1] * length for length in (2, 10, 2, 2, 10, 2, 2)])
    rollout = LocalRollout(make_tokenizer(), Sampling(max_new_tokens=10), [])
    assert rollout.groups(prompts, load_model()) == [[1, 4, 0], [2, 3, 5, 6]]


def test_the_same_seed_gives_the_same_samples_and_another_gives_others(load_model: LoadModel):
    model, prompts = load_model(), prompts_of(PROMPT_ROWS)
    first, again, other = (roll(model, prompts, max_new_tokens=6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.token_logps, again.token_logps)
    assert not torch.equal(first.ids, other.ids)


def test_rollout_neither_reads_nor_moves_the_global_randomness(load_model: LoadModel):
    model, prompts = load_model(), prompts_of(PROMPT_ROWS)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = roll(model, prompts, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(roll(model, prompts, max_new_tokens=6).ids, first.ids)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing_in_train_mode"])
def test_every_position_is_computed_once(arch: str, load_model: LoadModel, checkpointing: bool):
    """Prompts of 9 tokens and 7 new ones: one call on 9 positions and six on 1, which is P + T - 1 = 15 a row."""
    model = load_model(arch)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    writing_of(model, 20)  # examining a model calls it
    calls: list[tuple[int, ...]] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
    layer.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape[:2])))
    roll(model, prompts_of(PROMPT_ROWS), max_new_tokens=7)
    assert calls == [(6, 9)] + [(6, 1)] * 6


def test_logits_are_computed_where_a_token_is_drawn_and_nowhere_else(
    load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    """The model hands on hidden states of 32 numbers; the head of 304 is applied to one position a row."""
    model, features, logits = load_model(), [], []
    model.register_forward_hook(lambda _, __, output: features.append(output.logits.shape[-1]))

    class Recording(TokenSampler):
        def __call__(self, given: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            logits.append(tuple(given.shape))
            return super().__call__(given, *rest)

    monkeypatch.setattr(local_module, "TokenSampler", Recording)
    writing_of(model, 20)
    features.clear()
    roll(model, prompts_of(PROMPT_ROWS), max_new_tokens=3)
    assert features == [32, 32, 32]
    assert logits == [(6, VOCABULARY)] * 3


def test_decoding_stops_once_every_row_has_ended(load_model: LoadModel):
    model, calls = load_model(), []
    writing_of(model, 20)  # examining a model calls it
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    completions = roll(model, prompts_of(PROMPT_ROWS), list(range(VOCABULARY)), max_new_tokens=9)
    assert len(calls) == 1
    assert completions.ids.shape == (6, 1)
