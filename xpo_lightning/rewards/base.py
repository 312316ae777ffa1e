"""What a reward is: text in, one number a completion out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.batch import RawPrompt
from xpo_lightning.errors import InputError
from xpo_lightning.identity import fingerprint, import_path, settings_of
from xpo_lightning.rewards.checks import raised


class Reward(nn.Module, ABC):
    """Scores completions; a higher score is better.

    A reward is an `nn.Module`, so that the model inside it moves with the trainer's device. Settings are taken in
    `__init__`; weights are loaded by `load`, which the XPO module calls once before training.
    """

    _check: Callable[[], None] | None = None

    def set_check(self, check: Callable[[], None]) -> None:
        """Set what `check` does, here and in all rewards that this one is made of; the XPO module calls it."""
        for part in self.modules():
            if isinstance(part, Reward):
                part._check = check

    def check(self) -> None:
        """Let the run stop, if it is asked to; a `score` that takes long may call it now and then."""
        if self._check is not None:
            self._check()

    def load(self) -> None:
        """Load weights, if there are any. Called once, before the first score; a second call does nothing."""

    def identity(self) -> dict[str, Any]:
        """Tell what the scores depend on, so that scores that were kept are not taken for those of another reward.

        By default: the class, its public attributes as far as JSON can hold them, and a fingerprint of its weights.
        Override it where scores depend on something else, or an attribute changes while scores do not.

        Returns:
            Plain values by name. Called after `load`.
        """
        named = {"class": import_path(type(self)), **settings_of(self)}
        weights = list(self.named_parameters())
        return {**named, "fingerprint": fingerprint(weights)} if weights else named

    @abstractmethod
    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Score completions.

        Args:
            prompts: B prompts as the rows gave them: text or chat messages.
            completions: B completions as text, without special tokens.
            columns: The rows' other columns, each of length B.

        Returns:
            One score a completion, float32, on any device. (B,)

        Raises:
            InputError: The scores are not B finite numbers.
        """

    @torch.no_grad()
    def forward(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Call `score` without gradients.

        Raises:
            InputError: It raised one, or any other exception; the message then names the class.
        """
        try:
            return self.score(prompts, completions, columns)
        except InputError:
            raise
        except Exception as error:  # StopIteration too: as it is, it would end the training loop without a word
            raise InputError(f"reward {import_path(type(self))} {raised(error)}") from error
