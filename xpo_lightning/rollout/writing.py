"""Ways to decode completions token by token, from the fastest to the one that works for every model."""

from dataclasses import dataclass, replace
from enum import Enum

import torch

from xpo_lightning.models.forward.unshared import Rows


class Memory(Enum):
    """State that a model carries from one decoding step to the next."""

    KEYS_AND_VALUES = "with transformers' cache"
    OWN_STATE = "with the model's own state"
    IN_MODULES = "with transformers' cache and what the model's layers keep"
    READ_AGAIN = "with transformers' cache, read again at lengths that the config names"
    NOTHING = "reading all again for each token, a pass over a row for each new token"


@dataclass(frozen=True)
class Writing:
    """One way to decode completions.

    Args:
        rows: How rows of unequal length go through the model.
        memory: State that the model carries from one step to the next.
        is_shared: Whether several completions of a prompt reuse one encoding of it, and rows that have ended leave the
            batch.
        cache_dtype: Dtype of the shared KV cache; None is the model's own.
        reads_whole: Whether a new token reads the buffers of the shared KV cache whole; the mask hides what is not
            written.
        is_static: Whether every token runs the same step on the same buffers, so that a GPU can replay it.
    """

    rows: Rows
    memory: Memory = Memory.KEYS_AND_VALUES
    is_shared: bool = False
    cache_dtype: torch.dtype | None = None
    reads_whole: bool = False
    is_static: bool = False

    def __str__(self) -> str:
        """Describe this way in a message."""
        shared = "from shared prompts" if self.is_shared else self.memory.value
        dtype = "" if self.cache_dtype is None else f" in {self.cache_dtype}"
        whole = ", reading the cache whole" if self.reads_whole else ""
        return f"{self.rows} {shared}{dtype}{whole}{', a token at a time in one step' if self.is_static else ''}"


UNSHARED = (
    Writing(Rows.PADDED_LEFT),
    Writing(Rows.PADDED_LEFT, Memory.OWN_STATE),
    Writing(Rows.EVEN),
    Writing(Rows.EVEN, Memory.OWN_STATE),
    Writing(Rows.EVEN, Memory.IN_MODULES),
    Writing(Rows.EVEN, Memory.READ_AGAIN),
    Writing(Rows.EVEN, Memory.NOTHING),
    Writing(Rows.ALONE, Memory.NOTHING),
)
"""The ways without shared prompts, the fastest first; the last works for every model that can run a single row."""


def ways_for(
    cache_dtype: torch.dtype | None,
    *,
    has_head: bool,
    is_fast: bool,
    reads_whole: bool = False,
    is_static: bool = False,
) -> list[Writing]:
    """List the ways in which a model may decode, the fastest first.

    Args:
        cache_dtype: Preferred dtype of the KV cache; None is the model's own.
        has_head: Whether the vocabulary head can be skipped, which prompts padded on the right require.
        is_fast: Whether prompts may be shared.
        reads_whole: Whether reading buffers whole is the faster.
        is_static: Whether a GPU may replay the steps.
    """
    sides = [Rows.PADDED_RIGHT, Rows.PADDED_LEFT] if has_head else [Rows.PADDED_LEFT]
    dtypes = dict.fromkeys([cache_dtype, None])
    shared = [Writing(side, is_shared=True, cache_dtype=dtype) for side in sides for dtype in dtypes]
    static = [replace(way, is_static=True) for way in shared if is_static]
    whole = [replace(way, reads_whole=True) for way in shared if reads_whole]
    return [*(static + whole + shared if is_fast else []), *UNSHARED]
