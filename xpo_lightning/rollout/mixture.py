"""A session that samples from a mixture of two models' next-token distributions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.lm_head import apply_head
from xpo_lightning.rollout.opening import AnySession

MixtureKind = Literal["geometric", "by_token"]
T = TypeVar("T")
Lend = Callable[[], AbstractContextManager[nn.Module]]


class MixtureSession:
    """Runs the policy and the reference side by side on the same rows, and mixes their logits at each token.

    It has the part of `Session`'s interface that `LocalRollout.sample` needs. Both sessions sort and retire rows in the
    same way, so that a row is at the same place in both.

    Args:
        sessions: Those of the policy and of the reference, for the same prompts.
        lends: Lend the policy and the reference, which may be one model with other weights, so one at a time.
        share: Weight of the reference, or one for each prompt, (B,). Outside of [0, 1], `geometric` extrapolates.
        kind: `geometric`: its logits weigh that much; `by_token`: each token is drawn from it with that probability.

    Raises:
        InputError: The two models run their rows in different ways.
    """

    scores_again = False
    head = None

    def __init__(
        self,
        sessions: tuple[AnySession, AnySession],
        lends: tuple[Lend, Lend],
        share: float | Tensor,
        kind: MixtureKind,
    ) -> None:
        self.lends, self.share, self.kind = lends, share, kind
        self.own, self.other = own, other = sessions
        self.given, self.model = own.given, own.model
        if type(own) is not type(other):
            raise InputError(
                "model.sampler=MixtureSampler runs the policy and the reference on the same rows, and they decode in "
                "different ways here; take another sampler"
            )
        self.first = self._mixed(lambda session: session.first)

    @property
    def places(self) -> Tensor:
        """The prompt of each row."""
        return self.own.places

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """Append a token to each of the first N rows; return the mixture's logits of the next one, (N, V)."""
        return self._mixed(lambda session: session.advance(tokens, step))

    def retire(self, ended: Tensor) -> Tensor:
        """See `Session.retire`."""
        self.other.retire(ended)
        return self.own.retire(ended)

    def again(self) -> "MixtureSession":
        """See `Session.again`."""
        own, other = self._of_each(lambda session: session.again())
        return MixtureSession((own, other), self.lends, self.share, self.kind)

    def _mixed(self, features: Callable[[AnySession], Tensor]) -> Tensor:
        """Return logits of the mixture (N, V) from both models' features; each head is applied to its own."""
        ours, theirs = self._of_each(lambda session: apply_head(features(session), session.head).float())
        share = torch.as_tensor(self.share, dtype=ours.dtype, device=ours.device)
        if share.ndim:  # one for each prompt
            share = share[self.places[: len(ours)], None]
        if self.kind == "geometric":
            return ours.lerp(theirs, share)
        weights = torch.stack([1 - share, share]).log()
        return torch.logaddexp(ours.log_softmax(1) + weights[0], theirs.log_softmax(1) + weights[1])

    def _of_each(self, compute: Callable[[AnySession], T]) -> tuple[T, T]:
        """Compute something with each session, while its model is lent."""
        with self.lends[0]():
            own = compute(self.own)
        with self.lends[1]():
            return own, compute(self.other)
