"""Scores of rows that begin alike, such as two completions of one prompt: what they share is computed once."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xpo_lightning.batch import RawPrompt, cut
from xpo_lightning.forward.prefix import PromptCache
from xpo_lightning.forward.probe import vocabulary_size
from xpo_lightning.rewards.padding import forward_scores, pad_right

WORTH_SHARING = 16
"""Fewest common tokens that two rows are scored together for."""
Row = Sequence[int]
Twins = tuple[int, int, int]
"""Two rows, and how many tokens they share."""


def find_twins(rows: Sequence[Row], prompts: Sequence[RawPrompt]) -> tuple[list[Twins], list[int]]:
    """Pair the rows of equal prompts that share their first tokens.

    Args:
        rows: B rows of token ids.
        prompts: Their prompts; conversations are equal only if they are the same object.

    Returns:
        The pairs, longest shared part first, and the rows that are left over.
    """
    of_prompt: dict[Any, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        of_prompt[prompt if isinstance(prompt, str) else id(prompt)].append(row)
    twins: list[Twins] = []
    single: list[int] = []
    for members in of_prompt.values():
        for pair in cut(members, 2):
            shared = _common(rows[pair[0]], rows[pair[1]]) if len(pair) == 2 else 0
            if shared >= WORTH_SHARING:
                twins.append((pair[0], pair[1], shared))
            else:
                single.extend(pair)
    return sorted(twins, key=lambda twin: -twin[2]), single


def score_twins(
    model: PreTrainedModel, rows: Sequence[Row], twins: Sequence[Twins], micro_batch_size: int, pad_ids: Sequence[Any]
) -> Tensor:
    """Score pairs of rows, reading what each pair shares once.

    Args:
        model: A decoder that takes a cache of keys and values.
        rows: All rows.
        twins: N pairs of them.
        micro_batch_size: Most rows in one forward.
        pad_ids: See `score_rows`.

    Returns:
        The scores, float32: those of all first rows, then those of all second ones. (2N,)
    """
    firsts, seconds = [], []
    for some in cut(twins, max(1, micro_batch_size // 2)):
        both = _score_some(model, rows, some, pad_ids)
        firsts.append(both[: len(some)])
        seconds.append(both[len(some) :])
    return torch.cat(firsts + seconds)


def _score_some(model: PreTrainedModel, rows: Sequence[Row], twins: Sequence[Twins], pad_ids: Sequence[Any]) -> Tensor:
    """Score pairs in two forwards; the first rows come first. (2N,)."""
    device, vocabulary = next(model.parameters()).device, vocabulary_size(model)
    begins = [rows[first][:shared] for first, _, shared in twins]
    ends = [rows[twin[side]][twin[2] :] for side in (0, 1) for twin in twins]
    cache = PromptCache()
    ids, mask, pad_id = pad_right(begins, pad_ids, vocabulary)
    # Padding comes last, where causal attention does not see it, and attention without a mask is faster.
    everything = {"attention_mask": torch.ones_like(mask).to(device), "position_ids": _positions(ids).to(device)}
    forward_scores(model, ids, pad_id, past_key_values=cache, use_cache=True, **everything)
    cache.copies = 2
    end_ids, end_mask, pad_id = pad_right(ends, pad_ids, vocabulary)
    # Padding gets the position of the row's last token: its own might lie beyond the context.
    places = torch.minimum(_positions(end_ids), end_mask.sum(1, keepdim=True) - 1)
    positions = mask.sum(1).repeat(2)[:, None] + places
    seen = {
        "attention_mask": torch.cat([mask.repeat(2, 1), end_mask], 1).to(device),
        "position_ids": positions.to(device),
    }
    return forward_scores(model, end_ids, pad_id, past_key_values=cache, use_cache=True, **seen)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def _common(first: Row, second: Row) -> int:
    """Count the tokens that both rows begin with, short of either's last."""
    most = min(len(first), len(second)) - 1
    return next((place for place in range(most) if first[place] != second[place]), most)
