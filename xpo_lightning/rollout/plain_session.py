"""A session for models whose prompts cannot be shared: uses the model's own cache or state, and keeps every row."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from xpo_lightning.core.batch import Completions, Prompts, chunk
from xpo_lightning.models.forward.capabilities import capabilities_of
from xpo_lightning.models.forward.causal_forward import OwnState, base_of, last_features, positions_from
from xpo_lightning.models.forward.lengths import named_lengths
from xpo_lightning.models.forward.unshared import Rows, group_by_length
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.rollout.writing import Memory, Writing


class PlainSession:
    """Samples and scores as `Session` does, with any causal language model.

    Args:
        model: A transformers causal language model in eval mode, on the device of the prompts.
        prompts: B prompts.
        tokens_at_once: Maximum number of tokens, prompt and padding included, in one forward pass of `logps`.
        way: How rows are batched, and which state the model carries from one step to the next.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, tokens_at_once: int, way: Writing) -> None:
        self.model, self.given, self.tokens_at_once, self.way = model, prompts, tokens_at_once, way
        self.head = capabilities_of(model).head
        self.places = torch.arange(len(prompts), device=prompts.ids.device)
        counts = list(prompts.counts)
        self.rows = [list(range(len(counts)))]
        if way.rows is not Rows.PADDED_LEFT:
            self.rows = group_by_length(counts, together=way.rows is Rows.EVEN)
        self.readers = [_Reader(model, prompts.select(rows), way) for rows in self.rows]
        self.groups = [torch.as_tensor(rows, device=self.places.device) for rows in self.rows]
        self.has_ended = [False] * len(self.rows)
        features = torch.cat([reader.first for reader in self.readers])
        self.first = torch.empty_like(features).index_copy_(0, torch.cat(self.groups), features)

    @property
    def scores_again(self) -> bool:
        """Whether completions are scored again after sampling, as complete rows.

        Some models compute all tokens of a row differently once it is longer than a length that their config names, so
        a row that passes such a length while it is sampled has other log-probabilities afterwards.
        """
        return self.way.rows is not Rows.PADDED_LEFT

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """See `Session.advance`."""
        features = torch.zeros_like(self.first)
        for rows, reader, has_ended in zip(self.groups, self.readers, self.has_ended, strict=True):
            if not has_ended:
                features[rows] = reader.advance(tokens[rows], step)
        return features

    def retire(self, ended: Tensor) -> Tensor:
        """See `Session.retire`; here every row stays, and tokens after its end are dropped."""
        flags = ended.tolist()
        self.has_ended = [all(flags[row] for row in rows) for rows in self.rows]
        return torch.arange(0 if all(flags) else len(ended), device=ended.device)

    def again(self) -> "PlainSession":
        """See `Session.again`; here the prompts are always encoded again, since the cache cannot be rewound."""
        return PlainSession(self.model, self.given, self.tokens_at_once, self.way)

    def rest(self) -> None:
        """See `Session.rest`; here all caches are freed, since neither `again` nor `logps` uses them."""
        self.readers.clear()

    def logps(self, completions: Completions) -> Tensor:
        """See `Session.logps`."""
        width = self.given.ids.shape[1] + completions.ids.shape[1]
        groups = chunk(range(len(completions)), max(1, self.tokens_at_once // width))
        parts = [token_logps(self.model, self.given.select(rows), completions.select(rows)) for rows in groups]
        return torch.cat([part.sum(1) for part in parts])


class _Reader:
    """Runs rows through the model together, padded on the left if their lengths differ."""

    def __init__(self, model: nn.Module, prompts: Prompts, way: Writing) -> None:
        self.model, self.prompts, self.memory = model, prompts, way.memory
        self.head = capabilities_of(model).head
        self.is_padded = way.rows is Rows.PADDED_LEFT
        # With more tokens than they were trained on, some models compute earlier tokens differently than before.
        self.marks = set(named_lengths(model)[0]) if way.memory is Memory.READ_AGAIN else set()
        self.in_modules: list[tuple[nn.Module, str, Tensor]] = []
        self.ids, self.mask = prompts.ids, prompts.mask
        self.first = self._read()

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """Append a token to each row; return the features that predict the next one."""
        length = self.ids.shape[1]
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        if self.cache is None or length in self.marks:
            return self._read()
        return self._features(tokens[:, None], self.prompts.lengths[:, None] + step)

    def _read(self) -> Tensor:
        """Run all tokens with an empty cache."""
        self.cache = _empty(self.model, self.memory)
        return self._features(self.ids, positions_from(self.mask))

    def _features(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        mask, positions = (self.mask, positions) if self.is_padded else (None, None)
        for module, name, value in self.in_modules:
            setattr(module, name, value)
        features = last_features(self.model, ids, mask, positions, 1, cache=self.cache, head=self.head)[:, 0]
        if self.memory is Memory.IN_MODULES:
            self.in_modules = _tensors_in_modules(self.model)
        return features


def _tensors_in_modules(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Collect the tensors that modules keep as plain attributes, such as the state of a recurrence."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _empty(model: nn.Module, memory: Memory) -> Any:
    if memory is Memory.NOTHING:
        return None
    return OwnState() if memory is Memory.OWN_STATE else DynamicCache(config=base_of(model).config)  # type: ignore[arg-type]
