"""The data that travels through one XPO step.

Shapes in capitals: B pairs, P prompt tokens, T completion tokens, V vocabulary, D hidden size.
Masks are True on real tokens and are never inferred from token ids. Prompts are padded on the left, completions on the
right, so that a prompt ends where its completion begins.
Naming: the variable says who scores, the field says who wrote: `policy_logps.by_sampler` is the policy's
log-probability of the sampler's completion. The sampler writes the second completion of a pair (pi_samp of
arXiv 2405.21046): it is the frozen reference, unless `model.sampler` names another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")
U = TypeVar("U")
S = TypeVar("S", "Prompts", "Completions")

Messages = list[dict[str, Any]]
"""A conversation: `[{"role": "user", "content": "..."}, ...]`."""

RawPrompt = str | Messages
"""A prompt as the row gave it."""


@dataclass(frozen=True)
class Pair(Generic[T]):
    """The two sides of a comparison: one value for the policy's completions, one for the sampler's.

    Args:
        by_policy: Value for the completions that the policy wrote.
        by_sampler: Value for those that the sampler (by default the reference) wrote.
    """

    by_policy: T
    by_sampler: T

    def map(self, function: Callable[[T], U]) -> "Pair[U]":
        """Apply `function` to both sides."""
        return Pair(function(self.by_policy), function(self.by_sampler))


@dataclass(frozen=True)
class Prompts:
    """A batch of tokenized prompts.

    Args:
        ids: Token ids, padded on the left. (B, P)
        mask: True on real tokens. (B, P)
        raw: Each prompt as the row gave it, text or chat messages. Length B.
        columns: The rows' other columns, each of length B, passed to reward functions.
    """

    ids: Tensor
    mask: Tensor
    raw: tuple[RawPrompt, ...]
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes."""
        _check_ids_and_mask("prompt", self.ids, self.mask)
        if len(self.raw) != len(self.ids):
            raise ValueError(
                f"expected {len(self.ids)} raw prompts, one for each row of `ids`, but got {len(self.raw)}"
            )

    def __len__(self) -> int:
        """Return B."""
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens of each prompt, of shape (B,)."""
        return self.mask.sum(1)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The lengths as Python integers; they are read from the GPU once, and not again for selected rows."""
        return tuple(self.lengths.tolist())

    def select(self, rows: Sequence[int]) -> "Prompts":
        """Return the given rows, with no more padding than they need."""
        index = torch.as_tensor(rows, device=self.ids.device)
        counts = tuple(self.counts[row] for row in rows)
        start = self.ids.shape[1] - max(counts)
        columns = {name: tuple(values[row] for row in rows) for name, values in self.columns.items()}
        raw = tuple(self.raw[row] for row in rows)
        return _counted(Prompts(self.ids[index, start:], self.mask[index, start:], raw, columns), counts)

    def padded_right(self) -> tuple[Tensor, Tensor]:
        """Return the token ids and the mask with the padding moved to the right, of shape (B, P) each."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        lengths = self.lengths[:, None]
        return self.ids.take_along_dim((columns - lengths) % self.ids.shape[1], 1), columns < lengths


@dataclass(frozen=True)
class Completions:
    """One sampled completion for each prompt of a batch.

    Args:
        ids: Token ids, padded on the right. The token that ended a completion (EOS) is part of it. (B, T)
        mask: True on real tokens. (B, T)
        ended: True where the completion ended by itself (EOS or a stop string), False where it was cut off. (B,)
        texts: Decoded completions, without special tokens and without the stop string. Length B.
        token_logps: Natural log-probability of each token under the model that wrote it, at temperature 1 and over the
            full vocabulary whatever the sampling settings; 0 on padding; NaN if the writer gives none. (B, T)
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor
    texts: tuple[str, ...]
    token_logps: Tensor

    def __post_init__(self) -> None:
        """Check the shapes."""
        _check_ids_and_mask("completion", self.ids, self.mask)
        if self.token_logps.shape != self.ids.shape:
            raise ValueError(
                f"expected `token_logps` of shape {tuple(self.ids.shape)}, got {tuple(self.token_logps.shape)}"
            )
        if self.ended.shape != self.ids.shape[:1] or len(self.texts) != len(self.ids):
            raise ValueError(f"expected {len(self.ids)} entries in `ended` and `texts`")

    def __len__(self) -> int:
        """Return B."""
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens of each completion, of shape (B,)."""
        return self.mask.sum(1)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The lengths as Python integers; they are read from the GPU once, and not again for selected rows."""
        return tuple(self.lengths.tolist())

    @property
    def logps(self) -> Tensor:
        """The writer's log-probability of its own completion, summed over tokens, of shape (B,)."""
        return self.token_logps.sum(1)

    def to(self, device: torch.device | str) -> "Completions":
        """Return the same completions on another device."""
        names = ("ids", "mask", "ended", "token_logps")
        return _counted(replace(self, **{name: getattr(self, name).to(device) for name in names}), self.counts)

    def select(self, rows: Sequence[int]) -> "Completions":
        """Return the given rows, with no more padding than they need."""
        index = torch.as_tensor(rows, device=self.ids.device)
        counts = tuple(self.counts[row] for row in rows)
        end = max(counts)
        selected = Completions(
            ids=self.ids[index, :end],
            mask=self.mask[index, :end],
            ended=self.ended[index],
            texts=tuple(self.texts[row] for row in rows),
            token_logps=self.token_logps[index, :end],
        )
        return _counted(selected, counts)


@dataclass(frozen=True)
class BonusSample:
    """The completions of `model.bonus_sampler`, on which the exploration term is.

    Args:
        completions: One for each prompt. B rows.
        reference_logps: The reference's log-probability of each, summed over tokens. (B,)
    """

    completions: Completions
    reference_logps: Tensor


@dataclass(frozen=True)
class Experience:
    """Labelled pairs, ready for the loss.

    Args:
        prompts: The prompts. B rows.
        completions: The policy's and the sampler's completions. B rows a side.
        scores: The reward's scores, missing-EOS penalty included; or a judge's probability that the completion beats
            the other one. (B,) a side.
        labels: Probability that the policy's completion is the better one: 1, 0, or 0.5 for a tie. (B,)
        reference_logps: The reference's log-probability of each completion, summed over tokens. (B,) a side.
        silent: True where the label says nothing: scores too close, or no usable answer from a judge. None means
            nowhere. (B,)
        answered: False where a judge gave no usable answer. None means nowhere. (B,)
        sample: A third completion of each prompt, for the exploration term alone. None if there is none.
        previous_logps: The log-probability of each completion under the policy that wrote it, summed over tokens, for
            a loss that needs it. None if none does. (B,) a side.
        offline: True where the pair is one of a preference data set: its first completion is the chosen one, its second
            the rejected one, its scores are 1 and 0, and it has no exploration term. None means nowhere. (B,)
        comparisons: Comparisons that a judge was asked for to choose the pair among several completions. None if none
            was. (B,)
    """

    prompts: Prompts
    completions: Pair[Completions]
    scores: Pair[Tensor]
    labels: Tensor
    reference_logps: Pair[Tensor]
    silent: Tensor | None = None
    answered: Tensor | None = None
    sample: BonusSample | None = None
    previous_logps: Pair[Tensor] | None = None
    offline: Tensor | None = None
    comparisons: Tensor | None = None

    def __len__(self) -> int:
        """Return B."""
        return len(self.labels)

    @property
    def sampled(self) -> "Experience | None":
        """The pairs that the run has sampled, without those of a preference data set; None if there are none."""
        if self.offline is None:
            return self
        rows = (~self.offline).nonzero()[:, 0].tolist()
        return replace(self.select(rows), offline=None) if rows else None

    @property
    def written(self) -> list[Completions]:
        """The completions of each prompt: the policy's, the sampler's, and the third one if there is one."""
        third = [] if self.sample is None else [self.sample.completions]
        return [self.completions.by_policy, self.completions.by_sampler, *third]

    @property
    def identical(self) -> Tensor:
        """True where both completions are the same tokens, of shape (B,)."""
        return same_tokens(self.completions)

    @property
    def without_preference(self) -> Tensor:
        """True where the pair has no preference term: it is silent, or both completions are the same; (B,)."""
        return self.identical if self.silent is None else self.identical | self.silent

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Tokens of each prompt, and of the longest one of its completions. Length B."""
        longest = map(max, *(some.counts for some in self.written))
        return list(zip(self.prompts.counts, longest, strict=True))

    def to(self, device: torch.device | str) -> "Experience":
        """Return the same pairs on another device; Lightning calls it on predictions."""
        prompts = replace(self.prompts, ids=self.prompts.ids.to(device), mask=self.prompts.mask.to(device))
        prompts = _counted(prompts, self.prompts.counts)
        return self._mapped(prompts, lambda some: some.to(device), lambda values: values.to(device))

    def select(self, rows: Sequence[int]) -> "Experience":
        """Return the given pairs."""
        index = torch.as_tensor(rows, device=self.labels.device)
        return self._mapped(self.prompts.select(rows), lambda some: some.select(rows), lambda values: values[index])

    def _mapped(
        self,
        prompts: Prompts,
        completions: Callable[[Completions], Completions],
        change: Callable[[Tensor], Tensor],
    ) -> "Experience":
        third = self.sample
        return Experience(
            prompts=prompts,
            completions=self.completions.map(completions),
            scores=self.scores.map(change),
            labels=change(self.labels),
            reference_logps=self.reference_logps.map(change),
            silent=None if self.silent is None else change(self.silent),
            answered=None if self.answered is None else change(self.answered),
            sample=third and BonusSample(completions(third.completions), change(third.reference_logps)),
            previous_logps=self.previous_logps and self.previous_logps.map(change),
            offline=None if self.offline is None else change(self.offline),
            comparisons=None if self.comparisons is None else change(self.comparisons),
        )


def chunk(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut rows into groups of at most `size`, in their order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def left_pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Stack token rows of unequal length.

    Args:
        rows: B rows of token ids, none empty.
        device: Where the result goes.

    Returns:
        Token ids, 0 on padding (B, P) and the mask, True on real tokens (B, P).
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    return ids.to(device), mask.to(device)


def stack_completions(
    rows: Sequence[Sequence[int] | Tensor],
    ended: Sequence[bool],
    texts: Sequence[str],
    logps: Sequence[Sequence[float] | Tensor] | None = None,
) -> Completions:
    """Stack completions of unequal length, on the CPU.

    Args:
        rows: Token ids of B completions, none empty.
        ended: Whether each ended by itself.
        texts: Each as text.
        logps: The writer's log-probability of each token; None is NaN.
    """
    ids = pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    counts = tuple(map(len, rows))
    mask = torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
    if logps is None:
        token_logps = torch.zeros(ids.shape).masked_fill(mask, torch.nan)
    else:
        token_logps = pad_sequence([torch.as_tensor(row, dtype=torch.float32) for row in logps], batch_first=True)
    return _counted(Completions(ids, mask, torch.tensor(ended), tuple(texts), token_logps), counts)


def same_tokens(completions: Pair[Completions]) -> Tensor:
    """Tell which pairs hold the same tokens on both sides, of shape (B,)."""
    a, b = completions.by_policy, completions.by_sampler
    width = min(a.ids.shape[1], b.ids.shape[1])
    both_real = a.mask[:, :width] & b.mask[:, :width]
    equal = (a.ids[:, :width] == b.ids[:, :width]) | ~both_real
    return (a.lengths == b.lengths) & equal.all(1)


def concat_completions(parts: Sequence[Completions], width: int = 1) -> Completions:
    """Concatenate completions along the batch dimension, padded to the longest or, if more, to `width` tokens."""
    width = max(width, *(part.ids.shape[1] for part in parts))

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    together = Completions(
        ids=stacked([part.ids for part in parts]),
        mask=stacked([part.mask for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
        texts=tuple(text for part in parts for text in part.texts),
        token_logps=stacked([part.token_logps for part in parts]),
    )
    return _counted(together, tuple(count for part in parts for count in part.counts))


def join_experiences(sampled: Experience, offline: Experience) -> Experience:
    """Put the pairs of a preference data set behind sampled pairs.

    If sampled pairs have a third completion, the rejected one fills its place in the others, where nothing reads it.

    Args:
        sampled: Pairs that the run has sampled.
        offline: Pairs of a preference data set.
    """
    parts, asked = (sampled, offline), sampled.comparisons

    def joined(sides: Sequence[Pair[Tensor]]) -> Pair[Tensor]:
        by_policy, by_sampler = ([getattr(one, side) for one in sides] for side in ("by_policy", "by_sampler"))
        return Pair(torch.cat(by_policy), torch.cat(by_sampler))

    def marks(values: Sequence[Tensor | None], default: bool) -> Tensor:
        size = zip(values, parts, strict=True)
        return torch.cat([torch.full_like(one.labels, default).bool() if mark is None else mark for mark, one in size])

    third = sampled.sample and BonusSample(
        concat_completions([sampled.sample.completions, offline.completions.by_sampler]),
        torch.cat([sampled.sample.reference_logps, offline.reference_logps.by_sampler]),
    )
    return Experience(
        prompts=_concat_prompts([one.prompts for one in parts]),
        completions=Pair(
            concat_completions([one.completions.by_policy for one in parts]),
            concat_completions([one.completions.by_sampler for one in parts]),
        ),
        scores=joined([one.scores for one in parts]),
        labels=torch.cat([one.labels for one in parts]),
        reference_logps=joined([one.reference_logps for one in parts]),
        silent=marks([one.silent for one in parts], default=False),
        answered=None if sampled.answered is None else marks([sampled.answered, None], default=True),
        sample=third,
        offline=marks([None, offline.offline], default=False),
        comparisons=None if asked is None else torch.cat([asked, torch.zeros_like(offline.labels)]),
    )


def _concat_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Concatenate prompts along the batch dimension; a column that some of them lack is None there."""
    width = max(part.ids.shape[1] for part in parts)
    ids, masks = (
        torch.cat([torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0)) for tensor in tensors])
        for tensors in ([part.ids for part in parts], [part.mask for part in parts])
    )
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {
        name: tuple(value for part in parts for value in part.columns.get(name, (None,) * len(part))) for name in names
    }
    together = Prompts(ids, masks, tuple(prompt for part in parts for prompt in part.raw), columns)
    return _counted(together, tuple(count for part in parts for count in part.counts))


def _counted(rows: S, counts: tuple[int, ...]) -> S:
    """Attach known lengths, so that they are not read from the GPU again."""
    rows.__dict__["counts"] = counts
    return rows


def _check_ids_and_mask(what: str, ids: Tensor, mask: Tensor) -> None:
    if ids.ndim != 2 or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"expected {what} `ids` and a boolean `mask` of one shape (B, L), "
            f"but got {tuple(ids.shape)} and {tuple(mask.shape)} of {mask.dtype}"
        )
