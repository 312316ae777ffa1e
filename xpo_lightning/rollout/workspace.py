"""Buffers of decoding steps at fixed addresses, so that a captured step can be replayed."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.models.forward.buckets import columns_of_bucket, rows_of_bucket
from xpo_lightning.models.forward.causal_forward import base_of, last_features
from xpo_lightning.rollout.kv_cache import RolloutCache
from xpo_lightning.rollout.written import Written

MakeWritten = Callable[[int, int, torch.device], Written]


class Workspace:
    """Holds the buffers for the rollouts of all models of one kind; see `kind_of`.

    Args:
        rows: Maximum number of rows, R.
        columns: Maximum number of tokens of a row, prompt and completion, C.
        make_written: Allocates the buffers for sampled tokens, from R and C.
        cache_dtype: Dtype of keys and values; None is the model's own.
        device: Device of the buffers.
    """

    @torch.inference_mode(False)  # Training cannot write to inference tensors, which validation would make.
    def __init__(
        self,
        rows: int,
        columns: int,
        make_written: MakeWritten,
        cache_dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.rows, self.columns = rows_of_bucket(rows), columns_of_bucket(columns)
        self.cache = RolloutCache(self.rows, self.columns, cache_dtype)
        self.written = make_written(self.rows, self.columns, device)
        self.mask = torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.places = torch.arange(self.rows, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.features = torch.zeros(0, device=device)
        self._features: dict[Hashable, Tensor] = {}
        self.steps: dict[Hashable, Callable[[], None]] = {}
        self._user: Callable[[], Any] = lambda: None

    def enter(self, user: Any, places: Tensor, lengths: Tensor, mask: Tensor) -> None:
        """Give the workspace to a new user; first call `rest` of the previous one, which copies what it still needs.

        Args:
            user: The new user, which has a method `rest`; held by a weak reference.
            places: See `Session`. (B,)
            lengths: Tokens of each prompt. (B,)
            mask: True on real tokens. (B, at most C)
        """
        before = self._user()
        if before is not None:
            before.rest()
        self._user = weakref.ref(user)
        self.cache.clear()
        torch.arange(self.rows, out=self.places)
        self.lengths.zero_()
        self.mask.fill_(True)
        self.places[: len(places)] = places
        self.lengths[: len(places)] = lengths
        self.mask[: len(places), : mask.shape[1]] = mask

    def leave(self) -> None:
        """Release the workspace."""
        self._user = lambda: None

    @torch.inference_mode(False)
    def put_features(self, first: Tensor) -> None:
        """Set the features that the first step starts from, those of the prompts' last tokens, (B, F)."""
        key = (first.shape[1], first.dtype)
        if key not in self._features:  # Keep the other buffers: captured steps of other models use them.
            self._features[key] = first.new_zeros(self.rows, first.shape[1])
        self.features = self._features[key]
        self.features[: len(first)] = first

    def advance(self, model: nn.Module, head: nn.Linear | None, tokens: Tensor) -> Tensor:
        """Append a token to each of the first N rows, at the current step and column.

        Args:
            model: A model of this kind.
            head: Its vocabulary head, to skip it and return hidden states; None returns logits.
            tokens: Token ids. (N,)

        Returns:
            The features that predict the next token. (N, F)
        """
        rows, cache = slice(0, len(tokens)), self.cache
        cache.rows, cache.column = rows, self.column
        positions = self.lengths[rows, None] + self.written.step
        try:
            return last_features(model, tokens[:, None], self.mask[rows], positions, 1, cache=cache, head=head)[:, 0]
        finally:
            cache.column = None


class Workspaces:
    """Keeps the workspaces of a run, one for each kind of model.

    Args:
        make_written: Allocates the buffers for sampled tokens, from rows and columns.
    """

    def __init__(self, make_written: MakeWritten) -> None:
        self.make_written = make_written
        self._of: dict[Hashable, Workspace] = {}

    def find(self, model: nn.Module, rows: int, columns: int, cache_dtype: torch.dtype | None) -> Workspace:
        """Return the workspace for a model; replace it by a larger one if it is too small."""
        kind = (kind_of(model), cache_dtype)
        found = self._of.get(kind)
        if found is None or rows > found.rows or columns > found.columns:
            if found is not None:
                rows, columns = max(rows, found.rows), max(columns, found.columns)
            found = self._of[kind] = None  # type: ignore[assignment]  # free its memory first
            device = next(model.parameters()).device
            self._of[kind] = Workspace(rows, columns, self.make_written, cache_dtype, device)
        return self._of[kind]


def kind_of(model: nn.Module) -> Hashable:
    """Return a key that differs between models whose keys and values differ in shape or dtype."""
    weight, base = next(model.parameters()), base_of(model)
    device = weight.device.type
    coarse = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return base.config.to_json_string(), weight.dtype, weight.device, coarse  # type: ignore[operator,union-attr]
