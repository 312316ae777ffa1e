"""Scores token rows of unequal length in micro-batches; computes the common prefix of two rows once."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xpo_lightning.core.batch import RawPrompt, chunk
from xpo_lightning.models.forward.cpu_attention import fast_attention
from xpo_lightning.models.forward.norms import fast_norms
from xpo_lightning.models.forward.prefix_sharing import PromptCache
from xpo_lightning.models.forward.probe import vocabulary_size
from xpo_lightning.models.forward.unshared import Rows, group_by_length


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    micro_batch_size: int,
    pad_ids: Sequence[int | None],
    how: Rows = Rows.PADDED_RIGHT,
) -> Tensor:
    """Score token rows in micro-batches of similar length.

    Decoders read the score at the last token whose id is not `config.pad_token_id`. If padding is EOS, that is one
    token before a real EOS, and without a pad id decoders refuse batches. So each micro-batch is padded on the right
    with an id that ends none of its rows, and `config.pad_token_id` is set to it. Encoders end their rows with a
    special token of their own, so they keep their true pad id. Padding on the right moves no position; the mask hides
    it.

    Args:
        model: A sequence classifier with one label, in eval mode.
        rows: B rows of token ids, none empty.
        micro_batch_size: Maximum number of rows per forward pass.
        pad_ids: Candidate ids for padding, best first; None entries are skipped.
        how: How rows of unequal length go through the model.

    Returns:
        The scores, float32, on the model's device. (B,)
    """
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(model)
    scores = torch.empty(len(rows), dtype=torch.float32, device=device)
    # Longest first: memory runs out at once or never.
    by_length = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    size = min(micro_batch_size, vocabulary - 1)  # with more rows, every id of the vocabulary could end one
    groups = [by_length]
    if how is not Rows.PADDED_RIGHT:
        groups = group_by_length([len(row) for row in rows], together=how is Rows.EVEN)
    for chosen in chain.from_iterable(chunk(group, size) for group in groups):
        ids, mask, pad_id = pad_right([rows[row] for row in chosen], pad_ids, vocabulary)
        scores[chosen] = forward_scores(model, ids, pad_id, attention_mask=mask.to(device))
    return scores


def forward_scores(model: PreTrainedModel, ids: Tensor, pad_id: int, **arguments: Any) -> Tensor:
    """Run a classifier on token ids (B, L), padded with `pad_id`, and return the scores in float32, of shape (B,)."""
    device = next(model.parameters()).device
    with (
        padded_with(model.config, pad_id),
        torch.autocast(device.type, enabled=False),  # It would override the dtype that the user chose for this model.
        fast_attention(device),
        fast_norms(model, device),
    ):
        logits = model(input_ids=ids.to(device), **arguments).logits  # (B, 1)
    scores: Tensor = logits[:, 0].float()
    return scores


def pad_right(
    rows: Sequence[Sequence[int]], pad_ids: Sequence[int | None], vocabulary: int
) -> tuple[Tensor, Tensor, int]:
    """Stack token rows with padding that cannot be taken for a row's last token.

    Args:
        rows: B rows of token ids, none empty; B < vocabulary.
        pad_ids: Candidate ids for padding, best first; those that end a row are skipped.
        vocabulary: Number of token ids that the model knows.

    Returns:
        Token ids (B, L), the mask, 1 on real tokens (B, L), and the id used for padding.
    """
    last = {row[-1] for row in rows}
    wanted = [pad_id for pad_id in pad_ids if pad_id is not None and 0 <= pad_id < vocabulary]
    pad_id = next(candidate for candidate in chain(wanted, range(vocabulary)) if candidate not in last)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return ids, mask, pad_id


@contextmanager
def padded_with(config: PreTrainedConfig, pad_id: int) -> Iterator[None]:
    """Set the pad id in a model's config, and restore the old one on exit.

    Args:
        config: The model's config; the config of its text part is set too.
        pad_id: The id used for padding.
    """
    text_config = config.get_text_config()
    before = [(each, getattr(each, "pad_token_id", None)) for each in (config, text_config)]
    config.pad_token_id = text_config.pad_token_id = pad_id
    try:
        yield
    finally:
        for each, own in before:
            each.pad_token_id = own


WORTH_SHARING = 16
"""Smallest number of common first tokens for which two rows are scored as a pair."""
Row = Sequence[int]
PrefixPair = tuple[int, int, int]
"""Indices of two rows, and the number of first tokens that they share."""


def find_prefix_pairs(rows: Sequence[Row], prompts: Sequence[RawPrompt]) -> tuple[list[PrefixPair], list[int]]:
    """Pair the rows of equal prompts that share their first tokens.

    Args:
        rows: B rows of token ids.
        prompts: Their prompts; conversations are equal only if they are the same object.

    Returns:
        The pairs, longest shared prefix first, and the rows that are left over.
    """
    of_prompt: dict[Any, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        of_prompt[prompt if isinstance(prompt, str) else id(prompt)].append(row)
    twins: list[PrefixPair] = []
    single: list[int] = []
    for members in of_prompt.values():
        for pair in chunk(members, 2):
            shared = _common(rows[pair[0]], rows[pair[1]]) if len(pair) == 2 else 0
            if shared >= WORTH_SHARING:
                twins.append((pair[0], pair[1], shared))
            else:
                single.extend(pair)
    return sorted(twins, key=lambda twin: -twin[2]), single


def score_prefix_pairs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    twins: Sequence[PrefixPair],
    micro_batch_size: int,
    pad_ids: Sequence[Any],
) -> Tensor:
    """Score pairs of rows, computing the shared prefix of each pair once.

    Args:
        model: A decoder that takes a KV cache.
        rows: All rows.
        twins: N pairs of them.
        micro_batch_size: Maximum number of rows per forward pass.
        pad_ids: See `score_rows`.

    Returns:
        The scores, float32: those of all first rows, then those of all second ones. (2N,)
    """
    firsts, seconds = [], []
    for some in chunk(twins, max(1, micro_batch_size // 2)):
        both = _score_some(model, rows, some, pad_ids)
        firsts.append(both[: len(some)])
        seconds.append(both[len(some) :])
    return torch.cat(firsts + seconds)


def _score_some(
    model: PreTrainedModel, rows: Sequence[Row], twins: Sequence[PrefixPair], pad_ids: Sequence[Any]
) -> Tensor:
    """Score pairs in two forward passes; all first rows come before all second ones. (2N,)."""
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
    """Count the first tokens that both rows share, the last token of either row excluded."""
    most = min(len(first), len(second)) - 1
    return next((place for place in range(most) if first[place] != second[place]), most)
