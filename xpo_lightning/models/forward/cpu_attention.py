"""Attention for two cases in which torch's own is slow: a single query position, and bfloat16 on a CPU.

For a single query position, heads that share a key head attend together, so that no key is copied for them; by two
plain products on a CPU that is fast at bfloat16. In bfloat16 on a CPU, torch's kernel multiplies in float32 and also
computes scores that the causal mask hides. Here, queries are processed in blocks, each with only the keys that it may
see, and the backward pass recomputes the scores of a block.
Other devices, dtypes and options take transformers' own function.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xpo_lightning.models.forward.cpu import prefers_onednn, reads_bfloat16

BLOCK = 64
"""Queries in a block."""
SCORES = 2**21
"""Most scores that exist at a time, so that they stay in a CPU's cache."""
HIDDEN = -1e30
"""Score of a masked key; finite, so that padding, which sees no key, does not become NaN."""


@contextmanager
def fast_attention(device: torch.device, *, is_shape_fixed: bool = False) -> Iterator[None]:
    """Replace transformers' `sdpa` attention by ours for a block.

    Args:
        device: Where the model is.
        is_shape_fixed: Whether the same shapes recur, so that cuDNN's attention is worth its plan for each.
    """
    with nullcontext() if is_shape_fixed else for_any_shape(device):
        if device.type not in ("cpu", "cuda") or not _is_transformers_own():
            yield
            return
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_forward
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _transformers


@contextmanager
def for_any_shape(device: torch.device) -> Iterator[None]:
    """Switch cuDNN's attention off for a block: its plan for each new shape takes half a second on a GPU."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend (Vaswani et al. 2017, Eq. 1); several query heads may share a key head.

    Args:
        query: (B, H, N, D)
        key: (B, K, M, D), H a multiple of K.
        value: (B, K, M, D)
        mask: True where a query may see a key (B, 1, N, M); None is causal, with N = M.
        scale: Factor of the scores.

    Returns:
        The attended values. (B, H, N, D)
    """
    attended: Tensor = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return attended


def cache_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the best dtype of the KV cache for sampling; None is the model's own.

    On a CPU that is slow at bfloat16, each step would otherwise convert the cache to float32 again. Under autocast,
    float32 weights make bfloat16 keys and values too.
    """
    return torch.float32 if _is_attention_ours(model) and not prefers_onednn() else None


def reads_whole(model: nn.Module) -> bool:
    """Tell whether sampling should read buffers of keys whole: products in bfloat16 would first copy a part of one."""
    is_coarse = next(model.parameters()).dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return is_coarse and _is_attention_ours(model) and prefers_onednn()


def _is_attention_ours(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    replaced = getattr(config, "_attn_implementation", None) == "sdpa" and _is_transformers_own()
    weight = next(model.parameters())
    return replaced and weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface requires; call its own function for unsupported inputs."""
    rest = (attention_mask, dropout, scaling, is_causal)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    known = dropout == 0 and all(option is None or name in _HARMLESS for name, option in kwargs.items())
    if query.shape[2] == 1 and known and (attention_mask is None or attention_mask.shape[1:3] == (1, 1)):
        return _attended_from_last(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return _transformers(module, query, key, value, *rest, **kwargs)
    if query.shape[2] == 1:
        with torch.autocast("cpu", enabled=False):
            out, _ = _transformers(module, query.float(), key.float(), value.float(), *rest, **kwargs)
        return out.to(query.dtype), None
    key, value = key.to(query.dtype), value.to(query.dtype)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        simple = causal and query.shape[2] == key.shape[2]
    else:
        simple = attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if not (simple and known and query.shape[3] == value.shape[3]):
        return _transformers(module, query, key, value, *rest, **kwargs)
    return attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def _attended_from_last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from a single query position, (B, H, 1, D)."""
    dtype = query.dtype
    if reads_bfloat16(key):
        return _attended_by_products(query, key, value, mask, scale).to(dtype)
    if query.device.type == "cpu":  # other products with a vector are fast in float32 only
        query, key, value = query.float(), key.float(), value.float()
    elif mask is not None and mask.dtype == torch.bool:
        mask = _added(mask, query.dtype)
    grouped = _grouped(query, key)
    with torch.autocast("cpu", enabled=False):
        out = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scale)
    return out.reshape(*query.shape[:3], -1).to(dtype)


def _attended_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        scaled = (_grouped(query, key) * scale).to(key.dtype)
        out = _weights(scaled, key, None if mask is None else mask[:, :, None]).to(value.dtype) @ value
    return out.reshape(*query.shape[:3], -1)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """Put the heads that share a key head, (B, H, 1, D), beside each other, (B, K, G, D)."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into an additive one, once for all layers: torch would do it in each."""
    known: Tensor | None = getattr(mask, "_added", None)
    if known is None or known.dtype != dtype:
        known = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        mask._added = known  # type: ignore[attr-defined]
    return known


_HARMLESS = {"position_ids", "use_cache", "output_attentions", "sliding_window", "cache_position"}
_transformers = sdpa_attention_forward


def _is_transformers_own() -> bool:
    """Tell whether `sdpa` is transformers' own function, replaced neither by us nor by anyone else."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is _transformers


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out = torch.empty_like(query)
        for block in _blocks(query, key, mask):
            q, k, v, seen = block.of(query), key[block.heads_and_keys], value[block.heads_and_keys], block.mask(mask)
            weights = _weights(q * scale, k, seen)
            block.put(out, weights.to(v.dtype) @ v)
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key = torch.zeros_like(key, dtype=torch.float32, memory_format=torch.contiguous_format)
        of_value = torch.zeros_like(value, dtype=torch.float32, memory_format=torch.contiguous_format)
        for block in _blocks(query, key, mask):
            q, k, v, seen = block.of(query), key[block.heads_and_keys], value[block.heads_and_keys], block.mask(mask)
            grad = block.of(grads[0])
            scaled = q * ctx.scale
            weights = _weights(scaled, k, seen)
            of_weights = (grad @ v.transpose(2, 3)).float()
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).to(q.dtype)
            block.put(of_query, of_scores @ k * ctx.scale)
            of_key[block.heads_and_keys] += of_scores.transpose(2, 3) @ scaled
            of_value[block.heads_and_keys] += weights.to(v.dtype).transpose(2, 3) @ grad
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _weights(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """Return the softmax of scores in float32, of shape (B, K, G * N, M); a mask that is not boolean is added."""
    scores = query @ key.transpose(2, 3)
    if seen is not None:
        last = seen.shape[-1]  # a causal block masks only its last keys
        grouped = scores.view(*scores.shape[:2], -1, seen.shape[-2], scores.shape[3])
        if seen.dtype == torch.bool:
            grouped[..., -last:].masked_fill_(~seen, HIDDEN)
        else:
            grouped[..., -last:].add_(seen)
    return scores.softmax(-1, dtype=torch.float32)


class _Block:
    """A block of rows and queries; cuts its part from each tensor, and puts the result in its place."""

    def __init__(self, rows: slice, queries: slice, keys: int, groups: int) -> None:
        self.rows, self.queries, self.groups = rows, queries, groups
        self.heads_and_keys = (rows, slice(None), slice(0, keys))

    def of(self, tensor: Tensor) -> Tensor:
        """Cut the block's queries (B, H, N, D), and group those that share a key head (B, K, G * N, D)."""
        part = tensor[self.rows, :, self.queries]
        return part.reshape(part.shape[0], part.shape[1] // self.groups, -1, part.shape[3])

    def put(self, tensor: Tensor, result: Tensor) -> None:
        """Write the result for the block's queries into a tensor."""
        part = tensor[self.rows, :, self.queries]
        part.copy_(result.view(part.shape))

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """Return which keys each query may see (B, 1, 1, N, M); if causal, which of the last N keys (N, N)."""
        if mask is not None:
            return mask[self.rows, :, None, self.queries]
        size = self.queries.stop - self.queries.start
        return torch.ones(size, size, dtype=torch.bool).tril()


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[_Block]:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        reach = keys if mask is not None else stop
        step = max(1, SCORES // (heads * (stop - start) * reach))
        for row in range(0, batch, step):
            yield _Block(slice(row, min(row + step, batch)), slice(start, stop), reach, heads // key.shape[1])
