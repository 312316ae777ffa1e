"""Draws tokens from logits."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xpo_lightning.core.argument_types import check_arguments
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.lm_head import chosen_logps

BLOCK = 256
"""Number of weights in a block; a draw first finds the block by its sum, then the weight within it."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; the meaning of each setting is that of transformers' generation config.

    Args:
        max_new_tokens: Maximum number of tokens of a completion, EOS included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probabilities sum to at least p; 1 keeps all.
        min_p: Keep tokens whose probability is at least this fraction of the most likely token's; 0 keeps all.
        repetition_penalty: Penalty on tokens that the prompt or the completion already has; 1 is none.
        stop_strings: Texts that end a completion; it then counts as ended by itself, as with EOS.
        eos_token_ids: Token ids that end a completion. None takes those of the model's generation config and tokenizer;
            with an empty list no token ends a completion, and every one runs to `max_new_tokens`. A completion that is
            given as text ends with the first; for None, with the one that the chat template puts after a message.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    eos_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range."""
        check_arguments(Sampling.__init__, vars(self), "model.sampling.")
        _require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        # Outside this range, quotients leave the range of float32, and the samples would be silently wrong.
        sensible = self.temperature == 0 or 1e-3 <= self.temperature <= 1e3
        _require(sensible, "temperature", "0, or from 0.001 to 1000", self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        sensible = 1e-3 <= self.repetition_penalty <= 1e3
        _require(sensible, "repetition_penalty", "from 0.001 to 1000", self.repetition_penalty)
        _require(all(self.stop_strings), "stop_strings", "texts that are not empty", self.stop_strings)

    def processors(self) -> LogitsProcessorList:
        """Build transformers' own processors for these settings, in transformers' order."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors


class TokenSampler:
    """Draws one token per row, and returns its log-probability under the model's own, unprocessed logits.

    Args:
        sampling: The settings.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.processors = sampling.processors()
        self.greedy = sampling.temperature == 0

    def __call__(self, logits: Tensor, context: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one token per row.

        Args:
            logits: The model's logits. (B, V)
            context: Token ids so far, for the repetition penalty; padding replaced by a real token of the row. (B, L)
            uniforms: Random numbers in [0, 1), float64. (B,)

        Returns:
            Token ids (B,) and their log-probabilities at temperature 1 over the full vocabulary (B,).
        """
        logits = logits.float()
        probabilities = weights = logits.softmax(1)
        processed = logits
        if self.processors:
            processed = self.processors(cast("torch.LongTensor", context), cast("torch.FloatTensor", logits))
            weights = processed.softmax(1)
        tokens = processed.argmax(1) if self.greedy else draw(weights, uniforms)
        return tokens, chosen_logps(logits, probabilities, tokens[:, None])


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one index per row, with probability proportional to its weight, by inverting the weights' cumulative sum.

    The sum is inverted twice: first over the blocks of a row, then within the block that was found. A weight of 0 is
    never drawn: the first index whose cumulative sum exceeds the threshold has increased the sum.

    Args:
        weights: Not negative, not all 0. (B, V)
        uniforms: Random numbers in [0, 1), float64. (B,)

    Returns:
        Indices. (B,)
    """
    blocks, share = _invert(_block_sums(weights), uniforms[:, None])
    columns = blocks * BLOCK + torch.arange(BLOCK, device=weights.device)  # (B, BLOCK)
    inside = weights.gather(1, columns.clamp(max=weights.shape[1] - 1)).double()
    inside = torch.where(columns < weights.shape[1], inside, 0.0)
    offsets, _ = _invert(inside, share)
    # Non-finite weights must not give an index out of range; the log-probability then shows them.
    return (blocks * BLOCK + offsets)[:, 0].clamp(max=weights.shape[1] - 1)


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index at which the cumulative sum exceeds a share of the total, and how far into its weight that is.

    Both have shape (B, 1); the second is a fraction in [0, 1).
    """
    cumulative = weights.cumsum(1)
    threshold = uniforms * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    into = (threshold - (cumulative.gather(1, index) - weight)) / weight
    return index, into.clamp_(0.0, 1 - 2**-53)


def _block_sums(weights: Tensor) -> Tensor:
    """Sum each block of `BLOCK` weights (B, V), the last one shorter, in float64 (B, blocks)."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].view(len(weights), -1, BLOCK).sum(2)
    return torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1).double()


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"model.sampling.{name} must be {expected}, but is {value!r}")
