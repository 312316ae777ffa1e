"""Samplers of the completion that the policy's is compared with: pi_samp of arXiv 2405.21046, Appendix C.1."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from xpo_lightning.core.batch import Completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.timed_call import TimedFunction
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.rollout.context import RolloutContext
from xpo_lightning.rollout.mixture import MixtureKind


class Sampler(ABC):
    """Writes the second completion of each pair while the policy trains; validation compares with the reference.

    Attributes:
        is_policy: Whether the sampler is the policy itself.
        is_reference: Whether the sampler is the reference, whose log-probabilities are then known from sampling.
        kept_policies: Most earlier states of the policy that it keeps.
        writes_both: Whether it writes the policy's side of a pair, too.
    """

    is_policy = False
    is_reference = False
    kept_policies = 0
    writes_both = False

    @abstractmethod
    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Write completions of the prompts of a context.

        Args:
            context: B prompts, and the models that can complete them.
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64; if it `writes_both`, then
                numbers for something else are the last entry. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms` that is for completions; if it `writes_both`, the sampler's side
            of all pairs comes first, then the policy's.
        """

    def begin(self, policy: nn.Module) -> None:  # noqa: B027  (a hook)
        """Record what is needed of the policy before training.

        Args:
            policy: The policy.
        """

    def after_batch(self, batches: int, policy: nn.Module) -> None:  # noqa: B027  (a hook)
        """Record what is needed of the policy after a batch.

        Args:
            batches: Number of batches that the run has finished.
            policy: The policy with its current weights.
        """

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: plain values and tensors, equal on all ranks."""
        return {"class": type(self).__name__}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (a hook)
        """Restore a state, which may come from another class of sampler.

        Args:
            state: What `state` returned.

        Raises:
            InputError: The state lacks what this sampler needs.
        """


class ReferenceSampler(Sampler):
    """The frozen reference writes the second completion, as in Algorithm 1 of XPO. This is the default."""

    is_reference = True

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`."""
        return context.generate_with_reference(uniforms)


class PolicySampler(Sampler):
    """The policy writes both completions, as in online DPO (Guo et al. 2024, arXiv 2402.04792) and XPO's own runs."""

    is_policy = True

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`."""
        return context.generate_with_policy(uniforms)


class PreviousPolicySampler(Sampler):
    """An earlier state of the policy writes the second completion.

    Args:
        every: Number of batches (rollouts with the updates on them) in an iteration. In iteration t, the policy as it
            was when iteration t - 1 began writes the second completion; in the first, the untrained policy does.

    Raises:
        InputError: `every` is below 1.
    """

    kept_policies = 2

    def __init__(self, every: int = 1) -> None:
        check_range("model.sampler.init_args.every", every, least=1)
        self.every = every

    def begin(self, policy: nn.Module) -> None:
        """Take a snapshot of the untrained policy."""
        self.previous, self.current = Snapshot(policy), Snapshot(policy)

    def after_batch(self, batches: int, policy: nn.Module) -> None:
        """Take a snapshot at the end of an iteration; the one of its beginning becomes the sampler."""
        if batches % self.every == 0:
            self.previous, self.current = self.current, self.previous
            self.current.take(policy)

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`."""
        return context.generate_with(self.previous.lent(context.policy), uniforms)

    def state(self) -> dict[str, Any]:
        """Return both snapshots of the policy."""
        return {**super().state(), "previous": self.previous.state(), "current": self.current.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore both snapshots of the policy."""
        if "previous" not in state:
            raise InputError(
                f"model.sampler is PreviousPolicySampler, but the checkpoint was made with {state['class']}, so no "
                f"earlier policy is known; resume with that, or begin a new run from the exported policy"
            )
        self.previous.load_state(state["previous"], "model.sampler")
        self.current.load_state(state["current"], "model.sampler")


class MixtureSampler(Sampler):
    """A mixture of the policy and the reference, token by token, writes the second completion.

    Nash-MD (Munos et al. 2023, arXiv 2312.00886) compares the policy with a geometric mixture. Both models read each
    prompt and each token, so it costs as much as both writing.

    Args:
        reference_share: Weight of the reference, in [0, 1]: 0 is the policy, 1 the reference.
        kind: `geometric`: the next-token probabilities are proportional to pi^(1 - share) ref^share; `by_token`: they
            are (1 - share) pi + share ref, as if each token were drawn from the reference with that probability.

    Raises:
        InputError: `reference_share` is out of range.
    """

    def __init__(self, reference_share: float = 0.5, kind: MixtureKind = "geometric") -> None:
        check_range("model.sampler.init_args.reference_share", reference_share, least=0, most=1)
        self.reference_share, self.kind = reference_share, kind

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`."""
        return context.generate_with_mixture(uniforms, self.reference_share, self.kind)


class PythonSampler(Sampler):
    """A Python function writes the second completion: another model, a service, a column of the data set.

    It is called as `function(prompts=[...], columns={...}, **arguments)` with B prompts (text or chat messages) and the
    rows' other columns, each a list of length B, and returns B completions as text. Each is ended with an EOS token, or
    at its first stop string; one of more than `model.sampling.max_new_tokens` tokens, EOS included, is cut there.

    Args:
        function: The function; in YAML its import path or its file, for example `my_samplers.from_teacher` or
            `path/to/my_samplers.py:from_teacher`. The folder of the YAML file and the current folder are searched.
        arguments: Further keyword arguments of the function.
        timeout: How many seconds a call may take before the run ends with an error; null waits forever.

    Raises:
        InputError: The function cannot be called with these arguments, or `timeout` is not above 0.
    """

    def __init__(
        self, function: str | Callable[..., Any], arguments: dict[str, Any] | None = None, timeout: float | None = 1800
    ) -> None:
        given = ("prompts", "columns")
        self.function = TimedFunction("sampler function", function, given, arguments, timeout, "model.sampler")

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`; call the function once for each entry of `uniforms`, which it does not receive."""
        prompts, rollout = context.prompts, context.rollout
        written = []
        for _ in uniforms:
            columns = {name: list(values) for name, values in prompts.columns.items()}
            with context.timer("reference_rollout", context.device):
                texts = self.function(rollout.check, prompts=list(prompts.raw), columns=columns)
            check_texts(texts, len(prompts), self.function.who)
            written.append(rollout.given(prompts, texts))
        return written


def check_texts(texts: Any, expected: int, who: str) -> None:
    """Refuse a value that is not a list or tuple of `expected` texts.

    Raises:
        InputError: It is something else; the message names the function.
    """
    if not isinstance(texts, list | tuple) or len(texts) != expected or not all(isinstance(one, str) for one in texts):
        got = f"{len(texts)} values" if isinstance(texts, list | tuple) else type(texts).__name__
        raise InputError(f"{who} must return a list of {expected} completions as text, one a prompt, but gave {got}")
