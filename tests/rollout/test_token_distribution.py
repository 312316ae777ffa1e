"""Which token is drawn, and with what probability."""

import math
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, noise, prompts_of
from rolling import PROMPT_ROWS, LoadModel, assert_logps_are_the_models_own, roll
from torch import Tensor

from xpo_lightning import InputError, Sampling
from xpo_lightning.rollout import sampling as sampling_module
from xpo_lightning.rollout.sampling import TokenSampler, draw

RARE = 1e-6  # chance that a correct sampler fails a frequency test, over seeds


def uniforms(rows: int) -> Tensor:
    return noise().uniforms(rows, 1)[:, 0]


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
