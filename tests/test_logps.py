"""Log-probabilities of completions, against a loop over single rows, and their invariance to everything that pads."""

from collections.abc import Callable

import pytest
import torch
from conftest import VOCABULARY, completions_of, naive_token_logps, prompts_of, random_rows
from torch import nn

from xpo_lightning import Completions, Pair, Prompts
from xpo_lightning.logps import pair_logps, token_logps

PROMPT_ROWS = random_rows([6, 3, 9, 1, 7], seed=1)
COMPLETION_ROWS = random_rows([5, 8, 1, 6, 3], seed=2)
OTHER_ROWS = random_rows([2, 4, 9, 3, 5], seed=3)
CLOSE = {"rtol": 0.0, "atol": 3e-5}  # nats a token, in float32

LoadModel = Callable[..., nn.Module]


def widened(prompts: Prompts, completions: Completions, left: int, right: int) -> tuple[Prompts, Completions]:
    """Add padding that holds arbitrary token ids."""
    rows = len(prompts)
    before, after = torch.randint(VOCABULARY, (rows, left)), torch.randint(VOCABULARY, (rows, right))
    ids = torch.cat([before, torch.where(prompts.mask, prompts.ids, 7)], 1)
    mask = torch.cat([torch.zeros(rows, left, dtype=torch.bool), prompts.mask], 1)
    wide_prompts = Prompts(ids, mask, prompts.raw)
    wide = Completions(
        torch.cat([torch.where(completions.mask, completions.ids, 9), after], 1),
        torch.cat([completions.mask, torch.zeros(rows, right, dtype=torch.bool)], 1),
        completions.ended,
        completions.texts,
        torch.cat([completions.token_logps, torch.zeros(rows, right)], 1),
    )
    return wide_prompts, wide


@torch.no_grad()
def test_token_logps_of_a_ragged_batch_equal_a_loop_over_single_rows(arch: str, load_model: LoadModel):
    model = load_model(arch)
    ours = token_logps(model, prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS))
    assert ours.dtype == torch.float32
    assert ours.shape == (5, 8)
    for row, (prompt, completion) in enumerate(zip(PROMPT_ROWS, COMPLETION_ROWS, strict=True)):
        expected = torch.tensor(naive_token_logps(model, prompt, completion))
        torch.testing.assert_close(ours[row, : len(completion)], expected, **CLOSE)
        assert not ours[row, len(completion) :].any()
        assert ours[row].sum().item() == pytest.approx(sum(expected.tolist()), abs=1e-4)


@torch.no_grad()
def test_tiny_models_are_far_from_uniform(arch: str, load_model: LoadModel):
    """Uniform is log 304 = 5.72 nats; a spread of less than a nat would let a misplaced token pass unseen."""
    logps = token_logps(load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS))
    assert logps[completions_of(COMPLETION_ROWS).mask].std() > 1.0


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(11, 0), (0, 13), (4, 2)], ids=["left", "right", "both"])
def test_token_logps_with_more_padding_are_the_same(arch: str, load_model: LoadModel, left: int, right: int):
    model, prompts, completions = load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    expected = token_logps(model, prompts, completions)
    wide = token_logps(model, *widened(prompts, completions, left, right))
    torch.testing.assert_close(wide[:, :8], expected, **CLOSE)
    assert not wide[:, 8:].any()


@torch.no_grad()
@pytest.mark.parametrize("rows", [[3], [4, 0], [2, 4, 1, 0, 3], [1, 1, 1]], ids=["one", "two", "shuffled", "repeated"])
def test_token_logps_do_not_depend_on_the_other_rows(arch: str, load_model: LoadModel, rows: list[int]):
    model, prompts, completions = load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    expected = token_logps(model, prompts, completions)[rows]
    some = token_logps(model, prompts.select(rows), completions.select(rows))
    torch.testing.assert_close(some, expected[:, : some.shape[1]], **CLOSE)


@torch.no_grad()
def test_pair_logps_equal_two_token_logps(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    pair = Pair(completions_of(COMPLETION_ROWS), completions_of(OTHER_ROWS))
    ours = pair_logps(model, prompts, pair)
    assert ours.by_policy.shape == (5,)
    torch.testing.assert_close(ours.by_policy, token_logps(model, prompts, pair.by_policy).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ours.by_reference, token_logps(model, prompts, pair.by_reference).sum(1), rtol=0, atol=1e-4
    )
    assert (ours.by_policy - ours.by_reference).abs().min() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_gradient_of_pair_logps_equals_that_of_single_rows(load_model: LoadModel, checkpointing: bool):
    model, naive = load_model().train(), load_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair = Pair(completions_of(COMPLETION_ROWS), completions_of(OTHER_ROWS))
    ours = pair_logps(model, prompts_of(PROMPT_ROWS), pair)
    (2 * ours.by_policy - ours.by_reference).sum().backward()
    for rows, weight in ((COMPLETION_ROWS, 2.0), (OTHER_ROWS, -1.0)):
        for prompt, completion in zip(PROMPT_ROWS, rows, strict=True):
            steps = naive(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            (weight * steps.log_softmax(-1)[range(len(completion)), completion].sum()).backward()
    for (name, a), b in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item(), msg=name)


@torch.no_grad()
def test_token_logps_ignore_what_a_model_is_not_asked_for(load_model: LoadModel):
    """A model whose forward takes neither position_ids nor logits_to_keep is scored all the same."""

    class Bare(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model, prompts, completions = load_model(), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    torch.testing.assert_close(
        token_logps(Bare(model), prompts, completions), token_logps(model, prompts, completions), **CLOSE
    )
