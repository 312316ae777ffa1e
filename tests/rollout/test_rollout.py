"""Rollouts: which tokens are drawn, with what probability, when a completion ends, and what is left as it was."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    VOCABULARY,
    ChainModel,
    make_tokenizer,
    naive_token_logps,
    noise,
    prompts_of,
    random_rows,
    randomize_adapters,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from xpo_lightning import Completions, InputError, Prompts, Sampling
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.rollout import local as local_module
from xpo_lightning.rollout import sampling as sampling_module
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import writing_of
from xpo_lightning.rollout.sampling import TokenSampler, draw

PROMPT_ROWS = random_rows([4, 9, 2, 7, 1, 6], seed=1)  # sorting these and undoing it are different orders
RARE = 1e-6  # chance that a correct sampler fails a frequency test, over seeds

LoadModel = Callable[..., nn.Module]


def roll(
    model: nn.Module, prompts: Prompts, eos: list[int] | None = None, rows: int | None = None, **settings: Any
) -> Completions:
    """Sample with a fresh source of randomness; `seed` chooses it."""
    source = noise(settings.pop("seed", 0))
    tokenizer = settings.pop("tokenizer", None) or make_tokenizer()
    return LocalRollout(tokenizer, Sampling(**settings), eos or [], rows)(model, prompts, source)


def uniforms(rows: int) -> Tensor:
    return noise().uniforms(rows, 1)[:, 0]


def rows_of(completions: Completions) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(completions.ids, completions.mask, strict=True)]


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Chance of counts at least this far from expected: Q(df / 2, x / 2), x = sum (count - expected)^2 / expected."""
    expected = counts.sum() * probabilities.double()
    assert expected.min() >= 5, "too few draws for the approximation"
    x = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), x / 2).item()


# ---- log-probabilities kept from sampling ----

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.5},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


def assert_logps_are_the_models_own(model: nn.Module, prompts: Prompts, completions: Completions) -> None:
    for row, (prompt, completion) in enumerate(zip(PROMPT_ROWS, rows_of(completions), strict=True)):
        expected = torch.tensor(naive_token_logps(model, prompt, completion))
        kept = completions.token_logps[row]
        torch.testing.assert_close(kept[: len(completion)], expected, rtol=0, atol=5e-5)
        assert not kept[len(completion) :].any()
    torch.testing.assert_close(completions.token_logps, token_logps(model, prompts, completions), rtol=0, atol=5e-5)


def test_kept_logps_equal_a_fresh_forward(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    assert_logps_are_the_models_own(model, prompts, roll(model, prompts, list(range(0, 304, 10)), max_new_tokens=12))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kept_logps_stay_untempered_and_over_the_full_vocabulary(load_model: LoadModel, settings: dict[str, Any]):
    model, prompts = load_model(), prompts_of(PROMPT_ROWS)
    assert_logps_are_the_models_own(model, prompts, roll(model, prompts, max_new_tokens=8, **settings))


# ---- the distribution of a token ----


def test_draw_frequencies_follow_the_weights():
    """50,000 draws from softmax(2, 1, 0, -1, 0.5), scaled by an arbitrary 3.7."""
    probabilities = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64).softmax(0)
    tokens = draw((3.7 * probabilities).float().expand(50_000, -1), uniforms(50_000))
    assert chi_square_p(torch.bincount(tokens, minlength=5), probabilities) > RARE


def test_draw_never_takes_a_token_of_weight_0():
    """Zeros stand first, in the middle and last, where an off-by-one of the cumulative sum would land."""
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 3.0, 0.0]).expand(20_000, -1)
    counts = torch.bincount(draw(weights, uniforms(20_000)), minlength=6)
    assert counts[[0, 1, 3, 5]].tolist() == [0, 0, 0, 0]
    assert chi_square_p(counts[[2, 4]], torch.tensor([0.25, 0.75])) > RARE


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53], ids=["lowest", "highest"])
def test_draw_at_the_ends_of_the_unit_interval_takes_a_token_with_weight(uniform: float):
    """The lowest threshold takes the first token with weight and the highest the last, zeros around them or not."""
    token = draw(torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]), torch.tensor([uniform], dtype=torch.float64))
    assert token.tolist() == ([1] if uniform == 0 else [3])


def test_first_tokens_of_a_rollout_follow_the_model(load_model: LoadModel):
    """20,000 rollouts of one prompt; tokens expected fewer than five times are counted together."""
    model, prompt = load_model(), PROMPT_ROWS[0]
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(0)
    tokens = roll(model, prompts_of([prompt] * 20_000), max_new_tokens=1).ids[:, 0]
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    common = probabilities * 20_000 >= 5
    pooled = [torch.cat([column[common], column[~common].sum()[None]]) for column in (counts, probabilities)]
    assert chi_square_p(*pooled) > RARE


def test_rows_of_a_batch_are_drawn_independently():
    """Two rows of two equal tokens agree half of the time: 5,000 of 10,000 within 5 standard deviations of 50."""
    weights = torch.ones(20_000, 2)
    tokens = draw(weights, uniforms(20_000))
    assert abs((tokens[::2] == tokens[1::2]).sum().item() - 5_000) < 5 * 50


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
# What the model's own distribution is: e^logit / 13.1428, summing e^2, e, e^0.5, 1, e^-1 and e^-3.
HAND_WORKED: dict[str, tuple[dict[str, Any], list[float]]] = {
    # e^(2 * logit): 54.5982, 7.3891, 2.7183, 1, 0.1353, 0.0025; sum 65.8433.
    "temperature": ({"temperature": 0.5}, [0.829214, 0.112222, 0.041284, 0.015188, 0.002055, 0.000038]),
    # 7.3891 + 2.7183 = 10.1073.
    "top_k": ({"top_k": 2}, [0.731059, 0.268941, 0, 0, 0, 0]),
    # 0.5622, then 0.7690, then 0.8945: three tokens are needed for 0.8; 7.3891 + 2.7183 + 1.6487 = 11.7561.
    "top_p": ({"top_p": 0.8}, [0.628532, 0.231224, 0.140244, 0, 0, 0]),
    # e^-1 = 0.37, e^-1.5 = 0.22, e^-2 = 0.135, e^-3 = 0.05 of the likeliest: three tokens reach 0.2, as for top_p.
    "min_p": ({"min_p": 0.2}, [0.628532, 0.231224, 0.140244, 0, 0, 0]),
    # The context holds tokens 0 and 4: 2 / 2 = 1 and -1 * 2 = -2. e, e, e^0.5, 1, e^-2, e^-3 sum to 8.2704.
    "repetition": ({"repetition_penalty": 2.0}, [0.328675, 0.328675, 0.199352, 0.120913, 0.016364, 0.006020]),
    # Temperature first: e^4, e^2, e, 1, ...: 0.8292 + 0.1122 = 0.9414 reaches 0.9; 54.5982 + 7.3891 = 61.9872.
    "temperature_then_top_p": ({"temperature": 0.5, "top_p": 0.9}, [0.880797, 0.119203, 0, 0, 0, 0]),
}


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the distributions that tokens are drawn from. (B, V) each"""
    weights: list[Tensor] = []

    def recording(given: Tensor, *arguments: Tensor) -> Tensor:
        weights.append(given.double() / given.double().sum(1, keepdim=True))
        return draw(given, *arguments)

    monkeypatch.setattr(sampling_module, "draw", recording)
    return weights


@pytest.mark.parametrize(("settings", "expected"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_settings_give_the_distribution_worked_by_hand(
    drawn_from: list[Tensor], settings: dict[str, Any], expected: list[float]
):
    token, logp = TokenSampler(Sampling(**settings))(torch.tensor([LOGITS]), torch.tensor([[4, 0, 4]]), uniforms(1))
    assert drawn_from[0][0].tolist() == pytest.approx(expected, abs=2e-6)
    total = sum(math.exp(logit) for logit in LOGITS)
    assert logp.item() == pytest.approx(LOGITS[token.item()] - math.log(total), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "greedy"])
def test_settings_give_the_distribution_of_transformers_generate(
    drawn_from: list[Tensor], load_model: LoadModel, name: str
):
    model, prompts, settings = load_model(), prompts_of(PROMPT_ROWS[1:2]), SETTINGS[name]
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **settings}
    theirs = model.generate(
        prompts.ids,
        attention_mask=prompts.mask.long(),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **full,
    ).scores[0]
    roll(model, prompts, max_new_tokens=1, **settings)
    torch.testing.assert_close(drawn_from[0], theirs.double().softmax(1), rtol=1e-4, atol=1e-8)
    assert torch.equal(drawn_from[0] > 0, theirs.softmax(1) > 0)


def test_repetition_penalty_with_padding_penalizes_the_rows_own_tokens_alone(
    drawn_from: list[Tensor], load_model: LoadModel
):
    model, rows = load_model(), [PROMPT_ROWS[4], PROMPT_ROWS[1]]
    roll(model, prompts_of(rows), max_new_tokens=1, repetition_penalty=3.0)
    for row in rows:
        roll(model, prompts_of([row]), max_new_tokens=1, repetition_penalty=3.0)
    together, *alone = drawn_from
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop_strings", [""]),
    ],
)
def test_sampling_settings_out_of_range_are_refused_by_name(name: str, value: Any):
    with pytest.raises(InputError, match=rf"model\.sampling\.{name} must be"):
        Sampling(**{name: value})


# ---- greedy, against transformers ----


def generated(model: nn.Module, prompts: Prompts, eos: list[int], tokens: int) -> list[list[int]]:
    """Decode greedily with transformers' own generate; a row is cut after its first EOS."""
    ids = model.generate(
        prompts.ids,
        attention_mask=prompts.mask.long(),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=eos or None,
        pad_token_id=0,
    )
    rows = []
    for row in ids[:, prompts.ids.shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in eos]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def an_early_end(model: nn.Module, prompts: Prompts) -> int:
    """Choose as EOS a token that ends the first row after at most four tokens."""
    return generated(model, prompts, [], 4)[0][3]


def test_greedy_equals_transformers_generate(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    for eos in ([], [an_early_end(model, prompts)]):
        ours = roll(model, prompts, eos, max_new_tokens=14, temperature=0.0)
        assert rows_of(ours) == generated(model, prompts, eos, 14)
    assert len(rows_of(ours)[0]) <= 4


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


# ---- where a completion ends ----


def pieces(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    """Look up tokens by their text."""
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    assert None not in ids
    return ids


def test_several_eos_ids_each_end_a_completion_and_belong_to_it():
    """Chains 10-11-90, 20-21-22-91 and 30-31-31-...: the third never ends and is cut at five tokens."""
    model = ChainModel({10: 11, 11: 90, 20: 21, 21: 22, 22: 91, 30: 31, 31: 31}, otherwise=31)
    completions = roll(model, prompts_of([[10], [5, 20], [5, 5, 30]]), [90, 91], max_new_tokens=5)
    assert rows_of(completions) == [[11, 90], [21, 22, 91], [31] * 5]
    assert completions.ended.tolist() == [True, True, False]
    assert completions.lengths.tolist() == [2, 3, 5]


def test_eos_as_the_last_allowed_token_counts_as_ended():
    model = ChainModel({10: 11, 11: 90, 20: 21, 21: 22}, otherwise=90)
    completions = roll(model, prompts_of([[10], [20]]), [90], max_new_tokens=2)
    assert rows_of(completions) == [[11, 90], [21, 22]]
    assert completions.ended.tolist() == [True, False]


def test_eos_as_the_first_token_gives_an_empty_text():
    completions = roll(ChainModel({}, otherwise=90), prompts_of([[10], [20]]), [90], max_new_tokens=4)
    assert rows_of(completions) == [[90], [90]]
    assert completions.texts == ("", "")
    assert completions.ids.shape == (2, 1)


def test_without_eos_ids_every_completion_runs_to_max_new_tokens():
    completions = roll(ChainModel({}, otherwise=90), prompts_of([[10], [90]]), [], max_new_tokens=4)
    assert rows_of(completions) == [[90] * 4] * 2
    assert not completions.ended.any()


def test_eos_inside_the_prompt_neither_ends_nor_counts():
    model = ChainModel({90: 11, 11: 12, 12: 12}, otherwise=12)
    completions = roll(model, prompts_of([[90, 10, 90], [90]]), [90], max_new_tokens=3)
    assert rows_of(completions) == [[11, 12, 12]] * 2
    assert not completions.ended.any()


def test_token_0_is_an_ordinary_token():
    """Padding holds 0 too; masks tell them apart."""
    model = ChainModel({10: 0, 0: 0, 20: 90}, otherwise=90)
    completions = roll(model, prompts_of([[10], [0, 0, 20], [0]]), [90], max_new_tokens=3)
    assert rows_of(completions) == [[0, 0, 0], [90], [0, 0, 0]]
    assert completions.texts[0] == "!!!"
    assert completions.texts[1] == ""


@pytest.mark.parametrize("kind", ["pad_is_eos", "bos_is_eos", "no_pad", "chat"])
def test_masks_and_ends_do_not_depend_on_special_token_ids(kind: str):
    """The prompts hold EOS; of each pair one completion ends with EOS after two tokens, and one is cut after four."""
    tokenizer = make_tokenizer(kind)
    eos = tokenizer.eos_token_id
    model = ChainModel({10: 11, 11: eos, eos: 20, 20: 20}, otherwise=20)
    completions = roll(
        model, prompts_of([[eos, 10], [10, 5, 5, eos], [eos]]), [eos], max_new_tokens=4, tokenizer=tokenizer
    )
    assert rows_of(completions) == [[11, eos], [20] * 4, [20] * 4]
    assert completions.ended.tolist() == [True, False, False]
    assert completions.texts == (tokenizer.decode([11]), tokenizer.decode([20] * 4), tokenizer.decode([20] * 4))


@pytest.mark.parametrize("reverse", [False, True], ids=["as_is", "reversed"])
def test_a_row_that_ended_early_stays_as_it_is(load_model: LoadModel, reverse: bool):
    """A row's completion is the same alone and beside rows that go on after it has ended."""
    model = load_model()
    prompts = prompts_of(PROMPT_ROWS[::-1] if reverse else PROMPT_ROWS)
    eos = [an_early_end(model, prompts)]
    together = roll(model, prompts, eos, max_new_tokens=10, temperature=0.0)
    alone = [roll(model, prompts.select([row]), eos, max_new_tokens=10, temperature=0.0) for row in range(len(prompts))]
    assert rows_of(together) == [rows_of(one)[0] for one in alone]
    assert together.ended.tolist() == [one.ended.item() for one in alone]
    assert together.texts == tuple(one.texts[0] for one in alone)
    assert len(set(map(len, rows_of(together)))) > 1


# ---- stop strings ----


def test_stop_string_that_spans_tokens_ends_a_completion_without_being_in_its_text(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d = pieces(tokenizer, "a", "b", "c", "d")
    model = ChainModel({a: b, b: c, c: d, d: d}, otherwise=d)
    completions = roll(model, prompts_of([[d, a], [c]]), max_new_tokens=5, stop_strings=["cd"])
    assert rows_of(completions) == [[b, c, d], [d] * 5]
    assert completions.texts == ("b", "ddddd")
    assert completions.ended.tolist() == [True, False]


def test_stop_string_that_began_in_the_prompt_does_not_count(tokenizer: PreTrainedTokenizerFast):
    """The prompt ends in c and the completion begins with d; "cd" is not the completion's own."""
    c, d, e = pieces(tokenizer, "c", "d", "e")
    completions = roll(ChainModel({c: d, d: e}, otherwise=e), prompts_of([[c]]), max_new_tokens=4, stop_strings=["cd"])
    assert completions.texts == ("deee",)
    assert not completions.ended.any()


def test_stop_string_inside_one_token_cuts_the_text_before_it(tokenizer: PreTrainedTokenizerFast):
    """The token "today" holds "day"; of two stop strings the one that begins first cuts."""
    today, x = pieces(tokenizer, "today", "x")
    completions = roll(
        ChainModel({x: today}, otherwise=x), prompts_of([[x]]), max_new_tokens=4, stop_strings=["day", "od"]
    )
    assert rows_of(completions) == [[today]]
    assert completions.texts == ("t",)
    assert completions.ended.all()


def test_stop_string_beside_eos_ends_at_whichever_comes_first(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d = pieces(tokenizer, "a", "b", "c", "d")
    model = ChainModel({a: b, b: 300, c: d, d: 300}, otherwise=300)
    completions = roll(model, prompts_of([[a], [c]]), [300], max_new_tokens=5, stop_strings=["d"])
    assert rows_of(completions) == [[b, 300], [d]]
    assert completions.texts == ("b", "")
    assert completions.ended.tolist() == [True, True]


def test_stop_strings_with_tokens_beyond_the_tokenizer_do_not_fail(tokenizer: PreTrainedTokenizerFast):
    """Models often embed more ids than the tokenizer knows; such an id has no text."""
    assert len(tokenizer) <= 303
    a, b = pieces(tokenizer, "a", "b")
    completions = roll(
        ChainModel({a: 303, 303: b}, otherwise=b), prompts_of([[a]]), max_new_tokens=3, stop_strings=["zz"]
    )
    assert rows_of(completions) == [[303, b, b]]
    assert completions.texts == ("bb",)


def test_stop_string_that_holds_a_special_token_is_not_left_in_the_text(tokenizer: PreTrainedTokenizerFast):
    """Chat models end with a special token and a line break; the text has neither."""
    a, b, end, line_break = pieces(tokenizer, "a", "b", "<|im_end|>", "Ċ")
    model = ChainModel({a: b, b: end, end: line_break}, otherwise=a)
    completions = roll(model, prompts_of([[a]]), max_new_tokens=6, stop_strings=["<|im_end|>\n"])
    assert rows_of(completions) == [[b, end, line_break]]
    assert completions.ended.tolist() == [True]
    assert completions.texts == ("b",)


def test_stop_strings_end_each_row_by_itself(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d, e = pieces(tokenizer, "a", "b", "c", "d", "e")
    model = ChainModel({a: b, b: c, c: d, d: e}, otherwise=e)
    completions = roll(model, prompts_of([[a], [b], [c], [d]]), max_new_tokens=6, stop_strings=["cd", "ee"])
    assert completions.texts == ("b", "", "d", "")
    assert completions.lengths.tolist() == [3, 2, 3, 2]


# ---- groups of rows, randomness, cache ----


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
    assert_logps_are_the_models_own(model, prompts, sampled)


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
