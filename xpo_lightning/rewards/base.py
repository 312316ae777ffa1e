"""Base classes of rewards, which score each completion by itself, and of judges, which compare two."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError, describe_error
from xpo_lightning.core.fingerprint import fingerprint, import_path, recorded_path, settings_of
from xpo_lightning.rewards.validation import as_probabilities

OnInvalid = Literal["skip", "tie", "error"]


class Feedback(nn.Module, ABC):
    """Decides which completion is better; the base class of `Reward` and `Judge`.

    It is an `nn.Module`, so that a model inside it moves with the trainer's device. `__init__` takes the settings;
    `load`, which the XPO module calls once before training, loads the weights.
    """

    _check: Callable[[], None] | None = None

    def set_check(self, check: Callable[[], None]) -> None:
        """Set the function that `check` calls, here and in all rewards inside this one; the XPO module calls it."""
        for part in self.modules():
            if isinstance(part, Feedback):
                part._check = check

    def check(self) -> None:
        """Let the run stop if it was asked to; long computations may call this now and then."""
        if self._check is not None:
            self._check()

    @property
    def depends_on_batch(self) -> bool:
        """Whether a score depends on the other completions that are scored with it."""
        return False

    @abstractmethod
    def forward(self, *args: Any) -> Tensor:
        """Score B completions, or compare B pairs of them, without gradients; (B,)."""

    def load(self) -> None:
        """Load weights, if there are any. Called once, before anything else; a second call does nothing."""

    def try_ways(self) -> None:
        """Choose how models run while their weights are unsharded; called before they are sharded, after `load`."""
        for part in self.children():
            for each in part if isinstance(part, nn.ModuleList) else [part]:
                if isinstance(each, Feedback):
                    each.try_ways()

    def identity(self) -> dict[str, Any]:
        """Return everything that the scores depend on, so that cached scores are not used for another reward.

        By default: the class, its public attributes as far as JSON can hold them, and a fingerprint of its weights.
        Override it if scores depend on something else, or if an attribute changes while scores do not.

        Returns:
            Plain values by name. Called after `load`.
        """
        named = {"class": recorded_path(type(self)), **settings_of(self)}
        weights = list(self.named_parameters())
        return {**named, "fingerprint": fingerprint(weights)} if weights else named


class Reward(Feedback):
    """Scores completions; a higher score is better."""

    @abstractmethod
    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Score completions.

        Args:
            prompts: B prompts as in the rows: text or chat messages.
            completions: B completions as text, without special tokens.
            columns: The rows' other columns, each of length B.

        Returns:
            One score per completion, float32, on any device. (B,)

        Raises:
            InputError: The scores are not B finite numbers.
        """

    @torch.no_grad()
    def forward(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Call `score` without gradients.

        Raises:
            InputError: `score` raised it, or any other exception; the message then names the class.
        """
        try:
            return self.score(prompts, completions, columns)
        except InputError:
            raise
        except Exception as error:  # StopIteration too: unwrapped, it would silently end the training loop
            raise InputError(f"reward {import_path(type(self))} {describe_error(error)}") from error


class Judge(Feedback):
    """Compares two completions of a prompt.

    Two completions with the same text are a tie, for which the judge is not called.

    Args:
        invalid: What to do with a pair for which the judge gave no usable answer: `skip` leaves it out of the
            preference loss, `tie` counts it as a tie, `error` ends the run.
    """

    def __init__(self, invalid: OnInvalid = "skip") -> None:
        super().__init__()
        if invalid not in get_args(OnInvalid):
            raise InputError(f"model.reward.init_args.invalid must be skip, tie or error, but is {invalid!r}")
        self.invalid: OnInvalid = invalid

    @abstractmethod
    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Compare two completions of each prompt.

        Args:
            prompts: B prompts as in the rows: text or chat messages.
            firsts: B completions as text, without special tokens.
            seconds: B other completions, never with the same text.
            columns: The rows' other columns, each of length B.

        Returns:
            Probability that the first is better, in [0, 1]; NaN for a pair without a usable answer. (B,)
        """

    @torch.no_grad()
    def forward(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Call `compare` for completions that differ, without gradients, and check its answers.

        Returns:
            Probability that the first is better; NaN for a pair without a usable answer. float32, on the CPU. (B,)

        Raises:
            InputError: `compare` raised it, or any other exception, or returned something other than probabilities; or
                it gave no usable answer while `invalid` is `error`.
        """
        name = import_path(type(self))
        asked = [row for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)) if first != second]
        answers = torch.full((len(prompts),), 0.5)
        if not asked:
            return answers
        some = {key: [values[row] for row in asked] for key, values in columns.items()}
        asks, ones, others = ([texts[row] for row in asked] for texts in (prompts, firsts, seconds))
        try:
            said = self.compare(asks, ones, others, some)  # type: ignore[arg-type]
            answers[asked] = as_probabilities(said, len(asked), f"judge {name}")
        except InputError:
            raise
        except Exception as error:  # StopIteration too: unwrapped, it would silently end the training loop
            raise InputError(f"judge {name} {describe_error(error)}") from error
        missing = int(answers.isnan().sum())
        if missing and self.invalid == "error":
            raise InputError(
                f"judge {name} gave no usable answer for {missing} of {len(asked)} pairs; set "
                f"model.reward.init_args.invalid to skip or tie to go on without them"
            )
        return answers
