"""Computes the features of completions, each in one row with its prompt.

Rows are padded on the left or on the right, or not at all; unpadded rows are run with those of equal length, or one by
one. The last of these is the truth that every other way is compared with.
"""

from collections import defaultdict
from enum import Enum

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.models.forward.causal_forward import last_features, positions_from


class Rows(Enum):
    """How a model runs rows of unequal length."""

    PADDED_LEFT = "padded on the left"
    PADDED_RIGHT = "padded on the right"
    EVEN = "with those of the same length"
    ALONE = "one by one"

    def __str__(self) -> str:
        """Return the wording for messages."""
        return self.value


def unshared_features(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, how: Rows
) -> Tensor:
    """Run each prompt with its completion.

    Args:
        model: A transformers causal language model on the device of the prompts.
        prompts: B prompts.
        completions: B completions of them.
        head: The vocabulary head, to get hidden states in place of logits.
        how: How the model runs rows of unequal length.

    Returns:
        Features that predict each completion token: hidden states (B, T, D) or logits (B, T, V).
    """
    if how is Rows.PADDED_LEFT:
        return _padded_left(model, prompts, completions, head)
    if how is Rows.PADDED_RIGHT:
        return _padded_right(model, prompts, completions, head)
    return _unpadded(model, prompts, completions, head, together=how is Rows.EVEN)


def group_by_length(lengths: list[int], *, together: bool = True) -> list[list[int]]:
    """Group row indices by length or, without `together`, each row by itself."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        groups[length if together else row].append(row)
    return list(groups.values())


def _padded_left(model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None) -> Tensor:
    # Position P - 1 + t predicts completion token t; the last token predicts nothing.
    ids = torch.cat([prompts.ids, completions.ids[:, :-1]], 1)  # (B, P + T - 1)
    mask = torch.cat([prompts.mask, completions.mask[:, :-1]], 1)
    return last_features(model, ids, mask, positions_from(mask), completions.ids.shape[1], head=head)


def _padded_right(model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None) -> Tensor:
    """Pad on the right, where causal models do not see padding and need no mask."""
    rows = [row[:-1] for row in _joined(prompts, completions)]
    width, shortest = max(map(len, rows)), min(prompts.counts)
    ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    positions = torch.arange(width, device=ids.device).expand_as(ids)
    features = last_features(
        model, ids, None, positions, width - shortest + 1, head=head
    )  # from the first wanted position on
    steps = torch.arange(completions.ids.shape[1], device=ids.device)
    index = (prompts.lengths[:, None] - shortest + steps).clamp_(max=width - shortest)
    return features.take_along_dim(index[..., None], 1)


def _unpadded(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, *, together: bool
) -> Tensor:
    rows, counts = _joined(prompts, completions), completions.counts
    found: list[Tensor | None] = [None] * len(rows)
    for group in group_by_length([len(row) for row in rows], together=together):
        keep = max(counts[row] for row in group) + 1
        features = last_features(model, torch.stack([rows[row] for row in group]), None, None, keep, head=head)
        for place, row in enumerate(group):
            found[row] = features[place, keep - counts[row] - 1 : keep - 1]
    parts = [part for part in found if part is not None]
    width = completions.ids.shape[1]
    return torch.stack([nn.functional.pad(part, (0, 0, 0, width - len(part))) for part in parts])


def _joined(prompts: Prompts, completions: Completions) -> list[Tensor]:
    """Join the real tokens of each prompt and its completion, in rows of unequal length."""
    start = prompts.ids.shape[1]
    return [
        torch.cat([prompts.ids[row, start - before :], completions.ids[row, :after]])
        for row, (before, after) in enumerate(zip(prompts.counts, completions.counts, strict=True))
    ]
