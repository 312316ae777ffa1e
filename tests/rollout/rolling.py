"""A rollout in one call, and what tests of rollouts compare."""

from collections.abc import Callable
from typing import Any

import torch
from conftest import make_tokenizer, naive_token_logps, noise, random_rows
from torch import nn

from xpo_lightning import Completions, Prompts, Sampling
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.rollout.local import LocalRollout

PROMPT_ROWS = random_rows([4, 9, 2, 7, 1, 6], seed=1)  # sorting these and undoing it are different orders

LoadModel = Callable[..., nn.Module]


def roll(
    model: nn.Module, prompts: Prompts, eos: list[int] | None = None, rows: int | None = None, **settings: Any
) -> Completions:
    """Sample with a fresh source of randomness; `seed` chooses it."""
    source = noise(settings.pop("seed", 0))
    tokenizer = settings.pop("tokenizer", None) or make_tokenizer()
    return LocalRollout(tokenizer, Sampling(**settings), eos or [], rows)(model, prompts, source)


def rows_of(completions: Completions) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(completions.ids, completions.mask, strict=True)]


def assert_logps_are_the_models_own(model: nn.Module, prompts: Prompts, completions: Completions) -> None:
    for row, (prompt, completion) in enumerate(zip(PROMPT_ROWS, rows_of(completions), strict=True)):
        expected = torch.tensor(naive_token_logps(model, prompt, completion))
        kept = completions.token_logps[row]
        torch.testing.assert_close(kept[: len(completion)], expected, rtol=0, atol=5e-5)
        assert not kept[len(completion) :].any()
    torch.testing.assert_close(completions.token_logps, token_logps(model, prompts, completions), rtol=0, atol=5e-5)


def generated(model: nn.Module, prompts: Prompts, eos: list[int], tokens: int, **settings: Any) -> list[list[int]]:
    """Decode greedily with transformers' own generate; a row is cut after its first EOS."""
    ids = model.generate(
        prompts.ids,
        attention_mask=prompts.mask.long(),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=eos or None,
        pad_token_id=0,
        **settings,
    )
    rows = []
    for row in ids[:, prompts.ids.shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in eos]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def an_early_end(model: nn.Module, prompts: Prompts) -> int:
    """Choose as EOS a token that ends the first row after at most four tokens."""
    return generated(model, prompts, [], 4)[0][3]
