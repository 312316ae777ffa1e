"""Probes a way to compute features with a small batch of random prompts and completions.

Rows have unequal lengths, decoding crosses lengths that the model's config names, and completions are long enough for
six decoding steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts, left_pad
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.causal_forward import base_of, last_features
from xpo_lightning.models.forward.lengths import named_lengths, special_tokens
from xpo_lightning.models.forward.truth import Truth, name_of
from xpo_lightning.models.forward.unshared import Rows, unshared_features

STEPS = 7
"""Tokens of a completion: the prompt predicts the first, six decoding steps the others."""
ROWS = 6
"""Most prompts of a probe."""

Compute = Callable[[Prompts, Completions], Tensor]
"""Maps B prompts and two completions of each to the features of the completions' tokens, (2B, T, F)."""


class Probe:
    """Random rows of up to some length, and the features of each row computed alone.

    Args:
        model: A transformers causal language model, with or without adapters, on its device.
        head: Its vocabulary head, to compare hidden states in place of logits.
        reach: Tokens of the longest row, prompt and completion.
        seed: Seed of the token ids.
        key: The configuration key of the model, for errors.

    Raises:
        InputError: The model cannot compute a row alone, or its predictions depend on later tokens.
    """

    def __init__(
        self, model: nn.Module, head: nn.Linear | None, reach: int, seed: int = 0, key: str = "model.policy"
    ) -> None:
        self.model, self.head, self.key = model, head, key
        steps = max(1, min(STEPS, reach // 2))
        rows = draw_rows(model, prompt_lengths(model, reach, steps), seed)
        self.prompts = _prompts(model, rows)
        # The two completions of a prompt, rows r and B + r, are of unequal lengths.
        lengths = [max(1, steps - 2 * ((row // len(rows) + row) % 2)) for row in range(2 * len(rows))]
        self.completions = _completions(model, draw_rows(model, lengths, seed + 1000))
        self.repeated = self.prompts.select(list(range(len(rows))) * 2)
        self.truth = Truth(model, lambda: self._features(self.repeated, self.completions)[self.completions.mask], key)
        self._refuse_what_looks_ahead()

    def fault(self, compute: Compute, *, is_written: bool = False) -> str | None:
        """Compare a way with the truth.

        Args:
            compute: The way.
            is_written: Whether tokens are generated one after the other, so that the features of one see no later
                tokens: at a mark of the context they may differ from the features in the finished row.

        Returns:
            What is wrong with the way, or None if it is right.
        """
        mask = self.completions.mask

        def found() -> Tensor:
            return compute(self.prompts, self.completions)[:, : mask.shape[1]][mask]

        fault = self.truth.fault(found)
        return self._truth_of_prefixes.fault(found) if fault and is_written and self._has_marks else fault

    @cached_property
    def _has_marks(self) -> bool:
        """Whether later completion tokens change the prediction of the first."""
        one = self.completions.mask[:, :1]
        shortest = replace(self.completions, ids=self.completions.ids[:, :1], mask=one, token_logps=one.float())
        return self.truth.differ(
            lambda: self._features(self.repeated, shortest)[:, 0],
            lambda: self._features(self.repeated, self.completions)[:, 0],
        )

    @cached_property
    def _truth_of_prefixes(self) -> Truth:
        """The truth for each token, from a row that ends just before it."""

        def alone() -> Tensor:
            rows: list[Tensor] = []
            for row, (before, after) in enumerate(zip(self.repeated.counts, self.completions.counts, strict=True)):
                ids = torch.cat([self.repeated.ids[row, -before:], self.completions.ids[row, : after - 1]])[None]
                prefixes = (ids[:, :end] for end in range(before, before + after))
                rows += [last_features(self.model, one, None, None, 1, head=self.head)[0, -1] for one in prefixes]
            return torch.stack(rows)

        return Truth(self.model, alone, self.key)

    def _refuse_what_looks_ahead(self) -> None:
        """Refuse a model whose prediction of a token changes when the row continues after that token."""
        for length in (2, 4, 7):  # For one of these, a mark of the context may lie between the two rows' lengths.
            (row,) = draw_rows(self.model, [length + 2], seed=length)
            prompts = _prompts(self.model, [row[:length]])
            cut, whole = (_completions(self.model, [row[length:][:count]]) for count in (1, 2))
            if not self.truth.differ(
                lambda prompts=prompts, cut=cut: self._features(prompts, cut)[:, 0],  # type: ignore[misc]
                lambda prompts=prompts, whole=whole: self._features(prompts, whole)[:, 0],  # type: ignore[misc]
            ):
                return
        raise InputError(
            f"{self.key}: {name_of(self.model)} is no causal language model as it is configured: what it predicts "
            f"depends on the tokens that follow, or on chance; give another model, or is_decoder: true in its config"
        )

    def _features(self, prompts: Prompts, completions: Completions) -> Tensor:
        return unshared_features(self.model, prompts, completions, self.head, Rows.ALONE)


def prompt_lengths(model: nn.Module, reach: int, steps: int) -> list[int]:
    """Choose the prompt lengths of a probe: the longest, a short one, one between, and some just before a mark.

    Args:
        model: Its config names the marks.
        reach: Tokens of the longest row.
        steps: Tokens of a completion.
    """
    longest = max(1, reach - steps)
    likely, others = named_lengths(model)
    crossing = [mark - steps // 2 for mark in (*likely[::-1], *others[::-1])]
    wanted = [longest, min(2, longest), longest // 3 + 1, *(length for length in crossing if 2 < length < longest)]
    return list(dict.fromkeys(wanted))[:ROWS]


def draw_rows(model: nn.Module, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Draw rows of random token ids, without special tokens."""
    special = special_tokens(model)
    ordinary = [token for token in range(vocabulary_size(model)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randint(len(ordinary), (length,), generator=generator).tolist() for length in lengths]
    return [[ordinary[place] for place in row] for row in places]


def vocabulary_size(model: nn.Module) -> int:
    """Return how many token ids a model embeds; without a single table, the size of its largest embedding."""
    own = getattr(base_of(model), "get_input_embeddings", None)
    try:
        table: Any = None if own is None else own()
    except NotImplementedError:  # from transformers, if a model has no single table
        table = None
    if hasattr(table, "num_embeddings"):
        return int(table.num_embeddings)
    weight = getattr(table, "weight", None)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return len(max(tables, key=len) if weight is None else weight)


def _prompts(model: nn.Module, rows: list[list[int]]) -> Prompts:
    return Prompts(*left_pad(rows, next(model.parameters()).device), ("",) * len(rows))


def _completions(model: nn.Module, rows: list[list[int]]) -> Completions:
    width, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.arange(width, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return Completions(ids, mask, mask[:, 0], ("",) * len(rows), torch.zeros(ids.shape, device=device))
