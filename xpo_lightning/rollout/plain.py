"""A session for models whose prompts cannot be shared: transformers' own cache, and every row to the end."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from xpo_lightning.batch import Completions, Prompts, cut
from xpo_lightning.forward.anatomy import anatomy_of
from xpo_lightning.forward.call import base_of, last_features, positions_from
from xpo_lightning.logps import token_logps


class PlainSession:
    """Does what `Session` does with any causal language model; the arguments are the same.

    Args:
        model: A transformers causal language model in eval mode, on the device of the prompts.
        prompts: B prompts.
        tokens_at_once: Most tokens, prompt and padding included, that are scored in one call.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, tokens_at_once: int) -> None:
        self.model, self.given, self.tokens_at_once = model, prompts, tokens_at_once
        self.head = anatomy_of(model).head
        self.cache = DynamicCache(config=base_of(model).config)  # type: ignore[arg-type]
        self.places = torch.arange(len(prompts), device=prompts.ids.device)
        self.mask = prompts.mask
        self.first = self._features(prompts.ids, positions_from(prompts.mask))

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """See `Session.advance`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        return self._features(tokens[:, None], self.given.lengths[:, None] + step)

    def retire(self, ended: Tensor) -> Tensor:
        """See `Session.retire`; here every row stays, and what it writes after its end is dropped."""
        return torch.arange(len(ended), device=ended.device)

    def again(self) -> "PlainSession":
        """See `Session.again`; here the prompts are read anew, since the cache cannot go back."""
        return PlainSession(self.model, self.given, self.tokens_at_once)

    def rest(self) -> None:
        """See `Session.rest`; here nothing is continued again."""
        del self.cache

    def logps(self, completions: Completions) -> Tensor:
        """See `Session.logps`."""
        width = self.given.ids.shape[1] + completions.ids.shape[1]
        groups = cut(range(len(completions)), max(1, self.tokens_at_once // width))
        parts = [token_logps(self.model, self.given.select(rows), completions.select(rows)) for rows in groups]
        return torch.cat([part.sum(1) for part in parts])

    def _features(self, ids: Tensor, positions: Tensor) -> Tensor:
        return last_features(self.model, ids, self.mask, positions, 1, cache=self.cache, head=self.head)[:, 0]
