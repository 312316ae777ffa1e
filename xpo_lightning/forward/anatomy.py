"""What a causal language model lets us do to be fast, found out by trying it on the model itself."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from xpo_lightning.batch import Completions, Prompts, left_pad
from xpo_lightning.forward.call import base_of, evaluating, last_features
from xpo_lightning.forward.cpu import OneDNNLinear
from xpo_lightning.forward.prefix import plain_features, shared_features


@dataclass(frozen=True)
class Anatomy:
    """What a model lets us do.

    Args:
        head: The vocabulary head, where the model's logits are its outputs and nothing else; it can then be applied to
            the positions that matter, a few at a time. None where logits are scaled or capped afterwards.
        shares_prompt: Whether several completions can go on from one prompt's keys and values, with gradients.
        pads_right: Whether prompts may be padded on the right; not so with a sliding window, which counts padding.
    """

    head: nn.Linear | None
    shares_prompt: bool
    pads_right: bool


FAILURES = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot do what is tried."""
PLAIN = Anatomy(head=None, shares_prompt=False, pads_right=False)
_known: "weakref.WeakKeyDictionary[nn.Module, Anatomy]" = weakref.WeakKeyDictionary()


def anatomy_of(model: nn.Module) -> Anatomy:
    """Examine a model, once.

    Args:
        model: A transformers causal language model, with or without adapters, on its device.

    Returns:
        What it lets us do; what cannot be shown to give the plain path's numbers is not done.
    """
    if model not in _known:
        with torch.inference_mode(False):  # gradients are tried, too, even if the first use of a model is a validation
            _known[model] = _examine(model)
    return _known[model]


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Take the plain path for a while, which every model can go; for comparing numbers and speed."""
    before = anatomy_of(model)
    _known[model] = PLAIN
    try:
        yield
    finally:
        _known[model] = before


@torch.no_grad()
def _examine(model: nn.Module) -> Anatomy:
    device = next(model.parameters()).device
    with evaluating(model):
        try:
            head = _plain_head(model, device)
            found = replace(PLAIN, head=head, pads_right=head is not None and not has_window(model))
            reason = _cannot_share(model, found, device)
        except FAILURES as error:
            found, reason = PLAIN, f"{type(error).__name__}: {error}"
    if reason is not None:
        rank_zero_info(f"{type(base_of(model)).__name__}: each prompt is computed once a completion ({reason:.200})")
    return replace(found, shares_prompt=reason is None)


def _plain_head(model: nn.Module, device: torch.device) -> nn.Linear | None:
    """Find the head, and see whether numbers that it is made to return come out of the model unchanged."""
    embeddings = getattr(base_of(model), "get_output_embeddings", None)
    head = embeddings() if embeddings is not None else None
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, OneDNNLinear):
        return None
    marked = torch.linspace(-300, 300, head.out_features, device=device, dtype=head.weight.dtype)[None, None]
    head.forward = lambda _: marked  # type: ignore[method-assign,assignment]
    try:
        logits = last_features(model, *_one_token(device), 1)
    finally:
        del head.forward
    return head if torch.equal(logits.float(), marked.float()) else None


def _cannot_share(model: nn.Module, found: Anatomy, device: torch.device) -> str | None:
    """Compare both ways on a small batch; return why the prompt cannot be shared, or None where it can."""
    ids, mask = left_pad([[1, 2, 3, 4, 5], [3, 1, 2]], device)
    prompts = Prompts(ids, mask, ("", ""))
    tokens = torch.tensor([[1, 2, 3], [4, 1, 1], [2, 2, 5], [3, 1, 4]], device=device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    blank = torch.zeros(4, device=device)
    completions = Completions(tokens, real, blank.bool(), ("",) * 4, torch.zeros(4, 3, device=device))
    with torch.enable_grad():  # a cache may be refused where gradients are wanted
        shared = shared_features(model, prompts, completions, found.head, pads_right=found.pads_right).detach()
    plain = plain_features(model, prompts.select([0, 1, 0, 1]), completions, found.head)
    return change(shared, plain, plain.dtype)


def change(tried: Tensor, plain: Tensor, dtype: torch.dtype) -> str | None:
    """Say by how much a trial changes the plain way's numbers, or None where it is rounding in this type of weights."""
    error, size = float((tried - plain).abs().max()), float(plain.abs().max())
    rounding = (1e-3 if dtype == torch.float32 else 5e-2) * size
    return None if error <= rounding else f"numbers of up to {size:.3g} would change by {error:.3g}"


def has_window(model: nn.Module) -> bool:
    """Tell whether some layers see a part of the context alone."""
    config = base_of(model).config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    kinds = getattr(config, "layer_types", None) or []
    return any(kind != "full_attention" for kind in kinds) or bool(getattr(config, "sliding_window", None))


def _one_token(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    return one, one.bool(), one - 1
