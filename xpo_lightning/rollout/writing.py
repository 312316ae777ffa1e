"""The ways to write completions token by token."""

from dataclasses import dataclass
from enum import Enum

import torch

from xpo_lightning.forward.unshared import Rows


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
    """

    rows: Rows
    memory: Memory = Memory.KEYS_AND_VALUES
    is_shared: bool = False
    cache_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        """Say it in a message."""
        shared = "from shared prompts" if self.is_shared else self.memory.value
        return f"{self.rows} {shared}" if self.cache_dtype is None else f"{self.rows} {shared} in {self.cache_dtype}"


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


def ways_for(cache_dtype: torch.dtype | None, *, has_head: bool, is_fast: bool) -> list[Writing]:
    """List the ways that a model may write in, the fastest first.

    Args:
        cache_dtype: The type that keys and values are best kept in, None is the model's own.
        has_head: Whether the vocabulary head can be left out, as prompts padded on the right need it.
        is_fast: Whether prompts may be shared.
    """
    sides = [Rows.PADDED_RIGHT, Rows.PADDED_LEFT] if has_head else [Rows.PADDED_LEFT]
    dtypes = dict.fromkeys([cache_dtype, None])
    shared = [Writing(side, is_shared=True, cache_dtype=dtype) for side in sides for dtype in dtypes]
    return [*(shared if is_fast else []), *UNSHARED]
