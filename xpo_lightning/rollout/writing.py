"""The ways to write completions token by token."""

from dataclasses import dataclass, replace
from enum import Enum

import torch

from xpo_lightning.models.forward.unshared import Rows


class Memory(Enum):
    """What a model keeps of the tokens that it has read."""

    KEYS_AND_VALUES = "with transformers' cache"
    OWN_STATE = "with the model's own state"
    IN_MODULES = "with transformers' cache and what the model's layers keep"
    READ_AGAIN = "with transformers' cache, read again at lengths that the config names"
    NOTHING = "reading all again for each token, a pass over a row for each new token"


@dataclass(frozen=True)
class Writing:
    """One way to write.

    Args:
        rows: How rows of unequal length go through the model.
        memory: What the model keeps of them.
        is_shared: Whether several completions of a prompt go on from one reading of it, and rows leave as they end.
        cache_dtype: Type of shared keys and values; None is the model's own.
        is_static: Whether each token is the same step on the same buffers, for a GPU to replay.
    """

    rows: Rows
    memory: Memory = Memory.KEYS_AND_VALUES
    is_shared: bool = False
    cache_dtype: torch.dtype | None = None
    is_static: bool = False

    def __str__(self) -> str:
        """Say it in a message."""
        shared = "from shared prompts" if self.is_shared else self.memory.value
        dtype = "" if self.cache_dtype is None else f" in {self.cache_dtype}"
        return f"{self.rows} {shared}{dtype}{', a token at a time in one step' if self.is_static else ''}"


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
"""The ways without shared prompts, the fastest first; the last is right for whatever a row alone is right for."""


def ways_for(
    cache_dtype: torch.dtype | None, *, has_head: bool, is_fast: bool, is_static: bool = False
) -> list[Writing]:
    """List the ways that a model may write in, the fastest first.

    Args:
        cache_dtype: The type that keys and values are best kept in, None is the model's own.
        has_head: Whether the vocabulary head can be left out, as prompts padded on the right need it.
        is_fast: Whether prompts may be shared.
        is_static: Whether steps may be replayed.
    """
    sides = [Rows.PADDED_RIGHT, Rows.PADDED_LEFT] if has_head else [Rows.PADDED_LEFT]
    dtypes = dict.fromkeys([cache_dtype, None])
    shared = [Writing(side, is_shared=True, cache_dtype=dtype) for side in sides for dtype in dtypes]
    static = [replace(way, is_static=True) for way in shared if is_static]
    return [*(static + shared if is_fast else []), *UNSHARED]
