"""Interface of the exploration bonus: what `model.alpha` multiplies in the objective, and what it sees of each pair."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """One completion of each of B prompts, as both models score it.

    Args:
        logps: log pi(y), summed over tokens, in nats, with gradient. (B,)
        reference_logps: log ref(y), summed over tokens. (B,)
        lengths: Number of tokens; None if the caller gives none. (B,)
        hidden: The policy's last hidden states, with gradient: entry t predicts token t, so that entry 0 has read the
            prompt alone. None unless the bonus has `needs_hidden`. (B, T, D)
    """

    logps: Tensor
    reference_logps: Tensor
    lengths: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        """Log pi(y)/ref(y), in nats, with gradient, of shape (B,)."""
        return self.logps - self.reference_logps

    @property
    def last_hidden(self) -> Tensor:
        """The hidden state that predicts the last token and has read all others, of shape (B, D).

        Raises:
            ValueError: The hidden states or the lengths are missing.
        """
        if self.hidden is None or self.lengths is None:
            raise ValueError("a bonus that reads hidden states must have needs_hidden set to True")
        return self.hidden[torch.arange(len(self.hidden), device=self.hidden.device), self.lengths.clamp(min=1) - 1]


@dataclass(frozen=True)
class BonusInput:
    """What a bonus sees of B labelled pairs.

    Log-probabilities are clipped to within `model.bonus_clip` nats of the reference's, if that is set.

    Args:
        by_policy: The policy's completions.
        by_sampler: The sampler's completions.
        sample: The completions of `model.bonus_sampler`; without one, those of the sampler.
        labels: Probability that the policy's completion is preferred. (B,)
        beta: Strength of the KL constraint.
    """

    by_policy: Scored
    by_sampler: Scored
    sample: Scored
    labels: Tensor
    beta: float

    def of_rejected(self, value: Callable[[Scored], Tensor]) -> Tensor:
        """Return a value (B,) of the completion that is not preferred; of a label between 0 and 1, the expected value.

        Args:
            value: Maps completions to a number each. (B,)
        """
        return self.labels * value(self.by_sampler) + (1 - self.labels) * value(self.by_policy)


class Bonus(ABC):
    """Exploration bonus of each pair: `model.alpha` times it is added to a loss that is minimised.

    So a positive alpha lowers the bonus: where it is a log-probability, that completion becomes less likely.

    Attributes:
        uses_sample: Whether it is a function of `BonusInput.sample`, for which `model.bonus_sampler` may write a third
            completion.
        needs_hidden: Whether it reads hidden states.
        learns: Whether `observe` and `learn` are called after each batch of pairs.
    """

    uses_sample = False
    needs_hidden = False
    learns = False

    @abstractmethod
    def __call__(self, seen: BonusInput) -> Tensor:
        """Return the bonus of each pair, (B,), with gradient.

        Args:
            seen: B labelled pairs.
        """

    def observe(self, seen: BonusInput) -> Tensor:
        """Return what to learn from each pair of a finished batch; called without gradient.

        Args:
            seen: B pairs, scored by the policy as it is after the batch.

        Returns:
            Any numbers. (B, F)
        """
        raise NotImplementedError(f"{type(self).__name__} has learns set to True, and so must have observe")

    def learn(self, observed: Tensor, uniforms: Callable[[int, int], Tensor]) -> None:
        """Update the bonus's own state after a batch; called with the same values on all processes.

        Args:
            observed: What `observe` returned for the pairs of all processes. (N, F)
            uniforms: Draws random numbers in [0, 1), float64, of a shape (rows, columns); a resumed run draws the same.
        """
        raise NotImplementedError(f"{type(self).__name__} has learns set to True, and so must have learn")

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: plain values and tensors, equal on all ranks."""
        return {"class": type(self).__name__}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (a hook)
        """Restore a state of this class.

        Args:
            state: What `state` returned.

        Raises:
            InputError: The state does not fit.
        """
