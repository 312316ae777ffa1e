"""Generation context for a group of prompts; keeps each model's KV cache, so that prompts are encoded once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from typing_extensions import deprecated

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.mixture import MixtureKind, MixtureSession
from xpo_lightning.rollout.opening import AnySession
from xpo_lightning.rollout.reference_cache import Entry, missing_rows, with_kept

LendReference = Callable[[], AbstractContextManager[nn.Module]]


class RolloutContext:
    """Generates completions of B prompts with any of several models, and scores them under the reference.

    Args:
        rollout: Samples completions.
        policy: The policy.
        lend_reference: Lends the reference, in eval mode.
        prompts: B prompts.
        kept: The cached reference completion of each prompt, or None. Length B.
        timer: Times the phases.
    """

    def __init__(
        self,
        rollout: LocalRollout,
        policy: nn.Module,
        lend_reference: LendReference,
        prompts: Prompts,
        kept: Sequence[Entry | None],
        timer: PhaseTimer,
    ) -> None:
        self.rollout, self.policy, self.lend_reference = rollout, policy, lend_reference
        self.prompts, self.kept, self.timer = prompts, kept, timer
        self.device = prompts.ids.device
        self._read_by_policy: AnySession | None = None
        self._read_by_reference: AnySession | None = None

    @contextmanager
    def lend_policy(self) -> Iterator[nn.Module]:
        """Lend the policy as it samples, in eval mode, and not while the reference is lent: they may be one model."""
        with eval_mode(self.policy), cast_lora_weights(self.policy):
            yield self.policy

    def generate_with_reference(self, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Generate with the reference, except for prompts whose completion is cached.

        Args:
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms`.
        """
        missing = missing_rows(self.kept)
        written: list[Completions | None] = [None] * len(uniforms)
        if missing:
            some, numbers = self.prompts.select(missing), [every[missing] for every in uniforms]
            with self.timer("reference_rollout", self.device), self.lend_reference() as reference:
                read, new = self.rollout.several(reference, some, numbers, None)
                read.rest()
            written = list(new)
            if len(missing) == len(self.prompts):
                self._read_by_reference = read
        return [with_kept(fresh, self.kept, self.device) for fresh in written]

    def generate_with_policy(self, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Generate with the policy; encode the prompts once for all calls, if the model allows it.

        Args:
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms`.
        """
        with self.timer("policy_rollout", self.device), self.lend_policy() as policy:
            read, written = self.rollout.several(policy, self.prompts, uniforms, self._read_by_policy)
        self._read_by_policy = read
        return written

    def generate_with(self, lent: AbstractContextManager[nn.Module], uniforms: Sequence[Tensor]) -> list[Completions]:
        """Generate with another model.

        Args:
            lent: Context manager that lends the model, in eval mode.
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms`.
        """
        with self.timer("reference_rollout", self.device), lent as model:
            return self.rollout.several(model, self.prompts, uniforms, None)[1]

    def generate_with_mixture(
        self, uniforms: Sequence[Tensor], share: float | Tensor, kind: MixtureKind = "geometric"
    ) -> list[Completions]:
        """Generate with a mixture of the policy's and the reference's next-token distributions.

        Args:
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each
            share: Weight of the reference, or one for each prompt (B,); see `MixtureSession`.
            kind: How the two are mixed, see `MixtureSession`.

        Returns:
            B completions for each entry of `uniforms`, with the mixture's log-probabilities of their tokens.
        """
        written: list[Completions] = []
        lends = (self.lend_policy, self.lend_reference)
        with self.timer("reference_rollout", self.device):
            sessions = []
            for lend in lends:
                with lend() as model:
                    sessions.append(self.rollout.open(model, self.prompts, replays=False))
            session = MixtureSession((sessions[0], sessions[1]), lends, share, kind)
            for number, numbers in enumerate(uniforms):
                session = session.again() if number else session
                written.append(self.rollout.sample(session, numbers))
        return written

    @deprecated("by_reference is generate_with_reference now")
    def by_reference(self, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Call `generate_with_reference`, which had this name in earlier versions.

        Args:
            uniforms: See `generate_with_reference`.
        """
        return self.generate_with_reference(uniforms)

    @deprecated("by_policy is generate_with_policy now")
    def by_policy(self, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Call `generate_with_policy`, which had this name in earlier versions.

        Args:
            uniforms: See `generate_with_policy`.
        """
        return self.generate_with_policy(uniforms)

    @deprecated("by is generate_with now")
    def by(self, lent: AbstractContextManager[nn.Module], uniforms: Sequence[Tensor]) -> list[Completions]:
        """Call `generate_with`, which had this name in earlier versions.

        Args:
            lent: See `generate_with`.
            uniforms: See `generate_with`.
        """
        return self.generate_with(lent, uniforms)

    def policy_logps(self, completions: Sequence[Completions]) -> list[Tensor]:
        """Score completions under the policy in eval mode, as it samples: without dropout.

        Args:
            completions: B completions each.

        Returns:
            The policy's log-probability of each, summed over its tokens, in nats. (B,) each
        """
        with self.timer("policy_rollout", self.device), self.lend_policy() as policy:
            read = self.rollout.open(policy, self.prompts)
            return [read.logps(some) for some in completions]

    def reference_logps(self, completions: Sequence[Completions]) -> list[Tensor]:
        """Score completions under the reference; drop the policy's KV cache first, to save memory.

        Args:
            completions: B completions each.

        Returns:
            The reference's log-probability of each, summed over its tokens, in nats. (B,) each
        """
        self._read_by_policy = None
        with self.timer("reference_scoring", self.device), self.lend_reference() as reference:
            if self._read_by_reference is None:
                self._read_by_reference = self.rollout.open(reference, self.prompts)
            return [self._read_by_reference.logps(some) for some in completions]
