"""Probes which fast paths a causal language model supports, by comparing outputs with those of each row alone."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.causal_forward import base_of, last_features
from xpo_lightning.models.forward.cpu import OneDNNLinear
from xpo_lightning.models.forward.judging import at_rest
from xpo_lightning.models.forward.ladder import Ladder
from xpo_lightning.models.forward.lengths import BASE, context_length, first_reach, named_lengths
from xpo_lightning.models.forward.prefix_sharing import shared_features
from xpo_lightning.models.forward.probe import Probe, draw_rows
from xpo_lightning.models.forward.remembering import identity_of, remember
from xpo_lightning.models.forward.truth import FAILURES, described, name_of
from xpo_lightning.models.forward.unshared import Rows, unshared_features
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.models.sharding import is_sharded

W = TypeVar("W")
Features = Callable[[nn.Module, Prompts, Completions, "nn.Linear | None", W], Tensor]
"""Computes the features of two completions a prompt, (2B, T, F), in a given way."""


SEEDS = 4
"""Number of probes at the base length; if a model sorts or routes tokens, a single probe may miss an error."""


class Sharing(Enum):
    """How several completions share one prompt's keys and values."""

    PADDED_RIGHT = "from shared prompts padded on the right"
    PADDED_LEFT = "from shared prompts padded on the left"
    NOT = "each with its prompt"

    def __str__(self) -> str:
        """Return the wording for messages."""
        return self.value


class Capabilities:
    """Fast paths that one model supports; each is probed when rows of a new length first need it.

    Args:
        model: A transformers causal language model, with or without adapters, on its device.
        is_fast: Whether prompts may be shared and the vocabulary head skipped.
    """

    def __init__(self, model: nn.Module, *, is_fast: bool = True) -> None:
        self.is_fast, self.is_trainable, self.has_refused_replays = is_fast, False, False
        self.key = "model.policy"  # in errors
        with at_rest(model):
            self.head = _plain_head(model) if is_fast else None
        self.longest = context_length(model)
        self._model = weakref.ref(model)
        self._ladders: dict[str, Ladder[Any]] = {}
        self._probes: dict[tuple[int, int], Probe] = {}

    def choose(
        self, title: str, ways: Sequence[W], features: "Features[W]", length: int, *, is_written: bool = False
    ) -> W:
        """Return the fastest of several ways whose output equals that of each row alone.

        Args:
            title: What is computed; also the name under which the choice is kept.
            ways: The ways, the fastest first; the last must be right for every model that can compute a row alone.
            features: Computes features in a given way.
            length: Tokens of the longest row, padding included.
            is_written: See `Probe.fault`.

        Raises:
            InputError: The model cannot compute a row alone, or is no causal language model.
        """
        if title not in self._ladders:
            self._ladders[title] = self._ladder(title, ways, features, is_written)
        ladder: Ladder[W] = self._ladders[title]
        # All ranks of a sharded model must take the same way, whatever the length of their rows.
        way = ladder.surest if is_sharded(self.model) else ladder.way(length)
        # Outdated once the model is trained further or its adapters are on again.
        self._probes.clear()
        self.__dict__.pop("_identity", None)
        return way

    def surest(self, title: str) -> Any:
        """Return the way that `choose` found for the longest rows probed under a title."""
        return self._ladders[title].surest

    @property
    def may_replay(self) -> bool:
        """Whether steps may be captured: none was refused before, and the model is not sharded."""
        return not self.has_refused_replays and not is_sharded(self.model)

    @property
    def model(self) -> nn.Module:
        """The model, which must still exist."""
        model = self._model()
        if model is None:
            raise RuntimeError("expected the model to exist")
        return model

    @cached_property
    def _identity(self) -> Hashable | None:
        """What tells the model as it is now from others; worked out once for a choice, as it reads all weights."""
        return identity_of(self.model)

    def _ladder(self, title: str, ways: Sequence[W], features: "Features[W]", is_written: bool) -> Ladder[W]:
        def fault(way: W, reach: int) -> str | None:
            model = self.model

            def compute(prompts: Prompts, completions: Completions) -> Tensor:
                return features(model, prompts, completions, self.head, way)

            def probed() -> str | None:
                seeds = range(max(1, min(SEEDS, SEEDS * BASE // reach)))
                probes = (self._probe(reach, seed) for seed in seeds)
                return next((fault for probe in probes if (fault := probe.fault(compute, is_written=is_written))), None)

            with cast_lora_weights(model):
                return remember(self._identity, (title, way, reach, self.head is None), probed)

        ladder = Ladder(f"{name_of(self.model)}, {title}", ways, fault, self.longest, named_lengths(self.model)[0])
        reach = first_reach(self.model)
        for each in dict.fromkeys((min(BASE, reach), reach)):
            ladder.extend(each)
        return ladder

    def _probe(self, reach: int, seed: int) -> Probe:
        if (reach, seed) not in self._probes:
            while len(self._probes) >= 2 * SEEDS:  # the search for a limit makes many
                self._probes.pop(next(iter(self._probes)))
            self._probes[reach, seed] = Probe(self.model, self.head, reach, seed, self.key)
        return self._probes[reach, seed]


_known: "weakref.WeakKeyDictionary[nn.Module, Capabilities]" = weakref.WeakKeyDictionary()


def capabilities_of(model: nn.Module) -> Capabilities:
    """Return a model's capabilities; they are kept as long as the model."""
    if model not in _known:
        _known[model] = Capabilities(model)
    return _known[model]


@contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Switch prompt sharing and skipping of the head off for a block, to compare numbers and speed."""
    before = capabilities_of(model)
    _known[model] = Capabilities(model, is_fast=False)
    try:
        yield
    finally:
        _known[model] = before


def refuse_untrainable(model: nn.Module) -> None:
    """Refuse a model in train mode that cannot compute rows of any length; checked once, and only if unsharded.

    Raises:
        InputError: It cannot compute a row of 11 tokens.
    """
    found = capabilities_of(model)
    if found.is_trainable or is_sharded(model):
        return
    (row,) = draw_rows(model, [11], seed=0)
    ids = torch.tensor([row], device=next(model.parameters()).device)
    with torch.random.fork_rng(), torch.no_grad():  # dropout must not move the randomness of the run
        try:
            last_features(model, ids, None, None, 1)
        except FAILURES as error:
            raise InputError(
                f"model.policy: {name_of(model)} cannot be trained on a row of 11 tokens ({described(error)}); "
                f"give another model, or mend its config"
            ) from error
    found.is_trainable = True


def sharing_of(model: nn.Module, length: int) -> Sharing:
    """Return how completions share prompts when gradients are needed, in rows of up to `length` tokens."""
    found = capabilities_of(model)
    if not found.is_fast:
        return Sharing.NOT
    ways = list(Sharing) if found.head is not None else [Sharing.PADDED_LEFT, Sharing.NOT]
    return found.choose("training", ways, _shared, length)


def rows_of(model: nn.Module, length: int) -> Rows:
    """Return how to batch rows of up to `length` tokens, each a prompt with its completion."""
    return capabilities_of(model).choose("scoring", list(Rows), _unshared, length)


def _shared(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, way: Sharing
) -> Tensor:
    with torch.enable_grad():  # a model may refuse a cache when gradients are enabled
        return shared_features(model, prompts, completions, head, pads_right=way is Sharing.PADDED_RIGHT)


def _unshared(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, way: Rows
) -> Tensor:
    return unshared_features(model, prompts.select(list(range(len(prompts))) * 2), completions, head, way)


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """Return the vocabulary head if the model returns its output unchanged, else None; tested with made-up numbers."""
    embeddings = getattr(base_of(model), "get_output_embeddings", None)
    head = embeddings() if embeddings is not None else None
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, OneDNNLinear):
        return None
    one = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    marked = torch.linspace(-300, 300, head.out_features, device=one.device, dtype=head.weight.dtype)[None, None]
    head.forward = lambda _: marked  # type: ignore[method-assign,assignment]
    try:
        logits = last_features(model, one, one.bool(), one, 1)
    except FAILURES:
        return None
    finally:
        del head.forward
    return head if torch.equal(logits.float(), marked.float()) else None
