"""KV cache of a rollout, in buffers allocated once, from which rows that have ended can be removed."""

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from xpo_lightning.models.forward.causal_forward import base_of

COLUMNS = 64
"""Columns by which buffers grow that are read whole."""


class RolloutCache(Cache):
    """Keeps the keys and values of a batch, in buffers allocated once per layer.

    A forward pass sees the rows `rows` from column `begin` on, and writes its own keys and values at column `length`.
    The caller sets the three, so that prompts can be encoded a few at a time, each group with its own padding, and be
    continued all together. With `column` set, the rows see all columns, later ones included, which the model's mask
    must hide, and write at that column: then no step depends on Python numbers, so that it can be captured.

    Args:
        batch_size: Rows of the buffers, B.
        width: Columns of the buffers, for padded prompts and all tokens that will follow them, L.
        dtype: Dtype of the buffers; None is that of the model's keys and values.
        is_read_whole: Whether a step reads all columns of the buffers, which then have few that are not filled.

    Attributes:
        column: The column at which each row writes one token, (1,); None uses `begin` and `length`.
    """

    def __init__(
        self, batch_size: int, width: int, dtype: torch.dtype | None = None, *, is_read_whole: bool = False
    ) -> None:
        super().__init__(layers=[])
        self.shape, self.dtype, self.most, self.is_read_whole = (batch_size, width), dtype, width, is_read_whole
        self.rows, self.begin, self.length = slice(0, batch_size), 0, 0
        self.column: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B', H, N, D); return the rows' old and new ones (B', H, C + N, D)."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_BufferLayer(self))
        return self.buffers[layer_idx].update(key_states, value_states)

    def columns_read(self, end: int) -> int:
        """Prepare a step that writes at the last of `end` columns; return how many columns it reads."""
        if not self.is_read_whole:
            return end
        columns = min(self.most, -(-end // COLUMNS) * COLUMNS)
        if columns != self.shape[1]:
            self.shape = (self.shape[0], columns)
            for layer in self.buffers:
                layer.resize(columns)
        self.column = torch.tensor([end - 1])
        return columns

    def swap(self, here: Tensor, there: Tensor) -> None:
        """Exchange rows `here` (N,) with rows `there` (N,)."""
        for layer in self.buffers:
            exchange(layer.keys, here, there)
            exchange(layer.values, here, there)

    @property
    def buffers(self) -> "list[_BufferLayer]":
        """The layers, with their own type."""
        return cast("list[_BufferLayer]", self.layers)

    def clear(self) -> None:
        """Fill all buffers with zeros: attention multiplies masked values by 0, and 0 times garbage may be NaN."""
        for layer in self.buffers:
            layer.keys.zero_()
            layer.values.zero_()

    def copied(self, rows: int, length: int) -> "RolloutCache":
        """Copy only the first rows and columns, in the model's own dtype; the copy stores no further tokens."""
        copy = RolloutCache(rows, length)
        for layer in self.buffers:
            copy.layers.append(layer.copied(copy))
        return copy


def most_rows(model: nn.Module, width: int) -> int:
    """Return how many rows of `width` columns are decoded together on a CPU, where more save little time.

    That is 32, or if it is more, as many as need 128 MiB for keys and values in float32, as wide as the hidden states.
    """
    config: Any = base_of(model).config
    text = config.get_text_config(decoder=True)
    layers, width_of_layer = getattr(text, "num_hidden_layers", 1), getattr(text, "hidden_size", 1)
    row = 2 * 4 * layers * width_of_layer * width
    return max(32, int(2**27 // row))


def exchange(tensor: Tensor, here: Tensor, there: Tensor) -> None:
    """Exchange rows of a tensor in place."""
    tensor[torch.cat([here, there])] = tensor[torch.cat([there, here])]


class _BufferLayer(CacheLayerMixin):
    is_sliding = False  # keeps all columns; the mask applies the window
    keys: Tensor
    values: Tensor

    def __init__(self, cache: RolloutCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache: RolloutCache = weakref.proxy(cache)  # a cycle would keep the buffers until garbage collection

    @torch.inference_mode(False)  # A workspace's buffers are used after a validation too.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch_size, width = self.cache.shape
        self.own_dtype = key_states.dtype

        def buffer(states: Tensor) -> Tensor:
            return states.new_zeros(batch_size, states.shape[1], width, states.shape[3], dtype=self.cache.dtype)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._stored(self.keys, key_states), self._stored(self.values, value_states)

    def _stored(self, buffer: Tensor, states: Tensor) -> Tensor:
        cache, end = self.cache, self.cache.length + states.shape[2]
        if cache.column is not None:
            return buffer[cache.rows].index_copy_(2, cache.column, states.to(buffer.dtype))
        if end > buffer.shape[2]:
            return torch.cat([buffer[cache.rows, :, cache.begin : cache.length], states], 2)
        buffer[cache.rows, :, cache.length : end] = states
        return states if cache.begin == cache.length else buffer[cache.rows, :, cache.begin : end]

    def resize(self, columns: int) -> None:
        wider = (0, 0, 0, columns - self.keys.shape[2])
        self.keys, self.values = nn.functional.pad(self.keys, wider), nn.functional.pad(self.values, wider)

    def copied(self, cache: RolloutCache) -> "_BufferLayer":
        rows, length = cache.shape
        copy = _BufferLayer(cache)
        copy.own_dtype, copy.is_initialized = self.own_dtype, True
        copy.keys, copy.values = (
            buffer[:rows, :, :length].to(self.own_dtype, memory_format=torch.contiguous_format, copy=True)
            for buffer in (self.keys, self.values)
        )
        return copy

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether transformers must always build a mask: nothing else hides the later columns."""
        return self.cache.column is not None

    def get_seq_length(self) -> int:
        if self.cache.column is not None:
            return self.cache.column[0]  # type: ignore[return-value]  # as transformers' own static layers do
        return self.cache.length - self.cache.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.cache.column is not None:
            return self.cache.shape[1], 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.shape[1]
