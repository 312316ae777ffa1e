"""Engines outside of this process that write completions; the models at hand score them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.local import LocalRollout

Writer = Literal["policy", "reference"]


@dataclass(frozen=True)
class GenerationRequest:
    """Completions of a batch of prompts that one model is to write.

    Args:
        who: Who writes them.
        uniforms: Randomness in [0, 1) of each completion of a prompt, float64. (B, max_new_tokens) each
    """

    who: Writer
    uniforms: Sequence[Tensor]


class RolloutEngine(ABC):
    """Writes the completions of the policy and of the reference, for a whole batch of prompts at once.

    An engine of your own needs `sync` and `write`; `completions` turns token ids into what `write` returns.

    The loss never depends on an engine's numbers: whatever it wrote, the models at hand score. Its log-probabilities
    are compared with theirs instead. Where both come from the same weights the difference is rounding; where it is
    large, the engine has other weights, and the run ends.

    Args:
        max_logp_drift: Largest difference, in nats a token; None compares without a limit.

    Attributes:
        rollout: How completions are sampled and decoded, from `begin` on.
        needs_adapters: Whether the policy must be adapters (`model.lora`) of a model that the engine has.
        measured: Differences of the last batch, by the name that they are logged under.
        check: Called about once a second while waiting; may raise, to wait no longer.

    Raises:
        InputError: The limit is not above 0.
    """

    rollout: LocalRollout
    needs_adapters = False

    def __init__(self, max_logp_drift: float | None = None) -> None:
        if max_logp_drift is not None and not 0 < max_logp_drift < float("inf"):
            raise InputError(
                f"model.rollout.init_args.max_logp_drift must be above 0 and finite, or null, but is {max_logp_drift}"
            )
        self.max_logp_drift = max_logp_drift
        self.measured: dict[str, float] = {}
        self.check: Callable[[], None] = lambda: None

    def set_check(self, check: Callable[[], None]) -> None:
        """Say what to call while waiting.

        Args:
            check: May raise, to wait no longer.
        """
        self.check = check

    def context_length(self) -> int | None:
        """Ask the engine, once, how many tokens of prompt and completion it takes; None where it names no limit.

        Returns:
            Tokens; None unless an engine says otherwise.

        Raises:
            InputError: The engine cannot be used.
        """
        return None

    def prompt_limit(self, limit: int | None, max_new_tokens: int) -> int | None:
        """Return the most tokens that a prompt may have.

        Args:
            limit: What the model at hand allows; None is no limit.
            max_new_tokens: Most tokens of a completion.

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
        """Take note of how completions are sampled and decoded.

        Args:
            rollout: Has `sampling` (the settings), `tokenizer`, and `eos_token_ids`.

        Raises:
            InputError: The engine samples in another way under these settings.
        """
        self.rollout = rollout

    @abstractmethod
    def sync(self, policy: nn.Module) -> None:
        """Let the engine have the policy's weights as they are now, where they have changed; all processes call it.

        Args:
            policy: The policy, a transformers model or, with `model.lora`, peft's around one.

        Raises:
            InputError: The engine cannot take them.
        """

    @abstractmethod
    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """Write completions, those of all models together.

        Args:
            prompts: B prompts.
            asked: Who writes how many for each. The same again asks for the same samples.

        Returns:
            For each of `asked`, B completions for each entry of its `uniforms`, with the engine's log-probabilities.

        Raises:
            InputError: The engine is not there, or what it answers is of no use.
        """

    def close(self) -> None:  # noqa: B027  (a hook)
        """Take the policy's weights back from the engine; `sync` brings them again."""

    def completions(
        self,
        ids: Sequence[Sequence[int]],
        logps: Sequence[Sequence[float]],
        prompts: Prompts,
        stopped: Sequence[bool] | None = None,
    ) -> Completions:
        """Make completions of token ids; each ends with its first EOS token, and what follows is left out.

        Args:
            ids: At least one token id for each of B prompts.
            logps: The engine's log-probability of each token, at temperature 1 over the full vocabulary. Metrics take
                them, so they must be there.
            prompts: The B prompts; the completions go to their device.
            stopped: Whether each was ended by something else than EOS, a stop string; None is none.

        Returns:
            B completions.
        """
        eos = self.rollout.eos_token_ids
        ends = [next((end + 1 for end, token in enumerate(row) if token in eos), len(row)) for row in ids]
        rows = [torch.as_tensor(row[:end], dtype=torch.long) for row, end in zip(ids, ends, strict=True)]
        numbers = [torch.tensor(row[:end]) for row, end in zip(logps, ends, strict=True)]
        padded = pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(ends)[:, None]
        ended = torch.tensor([int(row[-1]) in eos for row in rows])
        if stopped is not None:
            ended |= torch.tensor(stopped)
        texts = self.rollout.texts(prompts, padded, mask)
        made = Completions(padded, mask, ended, texts, pad_sequence(numbers, batch_first=True))
        return made.to(prompts.ids.device)

    def compare(self, who: Writer, written: Sequence[Completions], logps: Tensor) -> None:
        """Compare the engine's log-probabilities with those of the model at hand.

        What is compared is the log-probability of a whole completion, a token: for samples of other weights the
        difference is the divergence from them, which cannot cancel; for rounding errors it is close to none.

        Args:
            who: Who wrote.
            written: K times B completions.
            logps: Log-probability of each under the model at hand, in nats. (K, B)

        Raises:
            InputError: They differ by more than the limit.
        """
        gaps = [(some.logps - own).abs().sum() for some, own in zip(written, logps, strict=True)]
        drift = float(sum(gaps)) / sum(sum(some.counts) for some in written)
        self.measured["rollout/logp_drift" if who == "reference" else "rollout/policy_logp_drift"] = drift
        # Numbers that are not finite are refused elsewhere, with the prompts that they belong to.
        if self.max_logp_drift is not None and drift > self.max_logp_drift:
            raise InputError(
                f"model.rollout: the engine's log-probabilities of the {who}'s completions differ by {drift:.3g} nats "
                f"a token from those computed here, more than model.rollout.init_args.max_logp_drift="
                f"{self.max_logp_drift:g}; {self.advice(who)}"
            )

    def advice(self, who: Writer) -> str:
        """Say what to look at where an engine has other weights than this process.

        Args:
            who: Whose log-probabilities differ.
        """
        return "check that the engine has the model of model.policy"
