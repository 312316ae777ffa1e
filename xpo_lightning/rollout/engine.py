"""Base class of engines that generate completions outside this process; the models in this process score them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts, stack_completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.local import LocalRollout

_OPTIONS = "model.rollout.init_args"
Writer = Literal["policy", "reference"]


@dataclass(frozen=True)
class GenerationRequest:
    """Request for completions of a batch of prompts by one model.

    Args:
        who: The model that generates.
        uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each
    """

    who: Writer
    uniforms: Sequence[Tensor]


class RolloutEngine(ABC):
    """Generates the completions of the policy and of the reference for a batch of prompts at once.

    An engine of your own must define `sync` and `write`; `completions` builds from token ids what `write` returns.

    The loss never uses an engine's log-probabilities: the models in this process score all completions. The engine's
    are only compared with theirs. If both have the same weights, the difference is rounding; a large difference means
    that the engine has other weights, and ends the run.

    Args:
        max_logp_drift: Largest allowed difference, in nats per token; None compares without a limit.
        sync_every: How many training batches the engine writes with the same weights of the policy.
        ahead: How many batches the engine writes ahead, while the policy is trained on earlier ones: 0 or 1.

    Attributes:
        rollout: Samples and decodes in this process, with the same settings; set by `begin`.
        needs_adapters: Whether the policy must be LoRA adapters (`model.lora`) of a model that the engine has.
        takes_adapters: Whether the policy may be LoRA adapters.
        copies_weights: Whether `sync` gives the engine a copy of the weights, so that it can be behind the policy, and
            `write` may run in another thread, while the policy is trained.
        has_reference: Whether the engine writes the reference's completions, too; if not, this process does.
        measured: Log-probability differences of the last batch, by metric name.
        check: Called about once a second while waiting; may raise to stop waiting.

    Raises:
        InputError: The limit is not above 0.
    """

    rollout: LocalRollout
    needs_adapters = False
    takes_adapters = True
    has_reference = True
    copies_weights = False

    def __init__(self, max_logp_drift: float | None = None, sync_every: int = 1, ahead: int = 0) -> None:
        if max_logp_drift is not None and not 0 < max_logp_drift < float("inf"):
            raise InputError(
                f"model.rollout.init_args.max_logp_drift must be above 0 and finite, or null, but is {max_logp_drift}"
            )
        check_range(f"{_OPTIONS}.sync_every", sync_every, least=1)
        check_range(f"{_OPTIONS}.ahead", ahead, least=0, most=1)
        for name in (name for name, is_set in (("sync_every", sync_every > 1), ("ahead", ahead > 0)) if is_set):
            if not self.copies_weights:
                raise InputError(
                    f"{_OPTIONS}.{name} has the engine be behind the policy, and {type(self).__name__} writes with the "
                    f"policy itself (copies_weights is False); leave it out"
                )
        self.max_logp_drift, self.sync_every, self.ahead = max_logp_drift, sync_every, ahead
        self.measured: dict[str, float] = {}
        self.check: Callable[[], None] = lambda: None

    def set_check(self, check: Callable[[], None]) -> None:
        """Set the function to call while waiting.

        Args:
            check: May raise to stop waiting.
        """
        self.check = check

    def context_length(self) -> int | None:
        """Return the maximum number of tokens of prompt and completion; an engine looks it up only once.

        Returns:
            Tokens; None, which is the default, if the engine states no limit.

        Raises:
            InputError: The engine cannot be used.
        """
        return None

    def prompt_limit(self, limit: int | None, max_new_tokens: int) -> int | None:
        """Return the most tokens that a prompt may have.

        Args:
            limit: Limit of the model in this process; None is no limit.
            max_new_tokens: Maximum number of tokens of a completion.

        Raises:
            InputError: The engine leaves no room for a prompt, or cannot be used.
        """
        context = self.context_length()
        if context is None:
            return limit
        if context <= max_new_tokens:
            raise InputError(
                f"model.rollout: model.sampling.max_new_tokens={max_new_tokens} leaves no room for a prompt in the "
                f"engine's context of {context} tokens; lower it, or start the server with a larger --max-model-len"
            )
        return context - max_new_tokens if limit is None else min(limit, context - max_new_tokens)

    def begin(self, rollout: LocalRollout) -> None:
        """Store the settings for sampling and decoding.

        Args:
            rollout: Has `sampling` (the settings), `tokenizer`, and `eos_token_ids`.

        Raises:
            InputError: The engine would sample differently under these settings.
        """
        self.rollout = rollout

    @abstractmethod
    def sync(self, policy: nn.Module) -> None:
        """Send the policy's current weights to the engine if they have changed (collective).

        Under `FSDP2Strategy` its weights are sharded; `models.sharding.visit_full_tensors` gathers one after the other.

        Args:
            policy: The policy: a transformers model or, with `model.lora`, the PEFT model around one.

        Raises:
            InputError: The engine cannot load them.
        """

    @abstractmethod
    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """Generate completions, for all requests together.

        Args:
            prompts: B prompts.
            asked: Requests, each for one model. Equal requests must give equal samples.

        Returns:
            For each request, B completions for each entry of its `uniforms`, with the engine's log-probabilities.

        Raises:
            InputError: The engine cannot be reached, or its answer is unusable.
        """

    def close(self) -> None:  # noqa: B027  (a hook)
        """Remove the policy's weights from the engine; `sync` sends them again."""

    def completions(
        self,
        ids: Sequence[Sequence[int]],
        logps: Sequence[Sequence[float]],
        prompts: Prompts,
        stopped: Sequence[bool] | None = None,
    ) -> Completions:
        """Build completions from token ids; cut each after its first EOS token.

        Args:
            ids: At least one token id for each of B prompts.
            logps: The engine's log-probability of each token, at temperature 1 over the full vocabulary. Metrics use
                them, so they are required.
            prompts: The B prompts; the completions are moved to their device.
            stopped: Whether something other than EOS, a stop string, ended each completion; None means none did.

        Returns:
            B completions.
        """
        eos = self.rollout.eos_token_ids
        ends = [next((end + 1 for end, token in enumerate(row) if token in eos), len(row)) for row in ids]
        rows = [list(row[:end]) for row, end in zip(ids, ends, strict=True)]
        numbers = [row[:end] for row, end in zip(logps, ends, strict=True)]
        ended = [row[-1] in eos or by_other for row, by_other in zip(rows, stopped or [False] * len(rows), strict=True)]
        decoder = self.rollout.decoder
        texts = [decoder.decode(end, row) for end, row in zip(decoder.read_ends(prompts), rows, strict=True)]
        return stack_completions(rows, ended, texts, numbers).to(prompts.ids.device)

    def compare(self, who: Writer, written: Sequence[Completions], logps: Tensor, *, is_behind: bool = False) -> None:
        """Compare the engine's log-probabilities with those computed in this process.

        The absolute differences between log-probabilities of completions (summed over tokens) are added up and divided
        by the number of tokens. If the engine samples from other weights, this measures the divergence from them, which
        cannot cancel within a completion; rounding errors nearly cancel.

        Args:
            who: The model that generated the completions.
            written: K times B completions.
            logps: Log-probability of each under the model in this process, in nats. (K, B)
            is_behind: Whether the engine is meant to have earlier weights, so that no difference is too large.

        Raises:
            InputError: They differ by more than the limit.
        """
        gaps = [(some.logps - own).abs().sum() for some, own in zip(written, logps, strict=True)]
        drift = float(sum(gaps)) / sum(sum(some.counts) for some in written)
        self.measured["rollout/logp_drift" if who == "reference" else "rollout/policy_logp_drift"] = drift
        # Non-finite numbers are refused elsewhere, in an error that names their prompts.
        if self.max_logp_drift is not None and drift > self.max_logp_drift and not is_behind:
            raise InputError(
                f"model.rollout: the engine's log-probabilities of the {who}'s completions differ by {drift:.3g} nats "
                f"a token from those computed here, more than model.rollout.init_args.max_logp_drift="
                f"{self.max_logp_drift:g}; {self.advice(who)}"
            )

    def advice(self, who: Writer) -> str:
        """Return what the user should check if the engine has other weights than this process.

        Args:
            who: The model whose log-probabilities differ.
        """
        return "check that the engine has the model of model.policy"
