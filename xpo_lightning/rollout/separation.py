"""Whether a server keeps an adapter out of what its base model writes at the same time."""

from collections.abc import Callable
from typing import Any

from xpo_lightning.rollout.vllm_protocol import Answer

Ask = Callable[[list[dict[str, Any]]], list[Answer]]
ROUNDING = 0.25
"""Nats a token that log-probabilities may move by when other completions are computed beside them."""
_PROMPT, _TOKEN, _TOKENS, _BESIDE = [1, 2, 3, 4], 5, 16, 8


def keeps_apart(ask: Ask, base: str, adapter: str, context: int | None) -> bool:
    """Have the base model write the same alone and beside an adapter, and compare.

    vLLM's LoRA kernels for CPUs do not keep them apart (vllm-project/vllm#48421).

    Args:
        ask: Has completions written at once.
        base: Name of the base model.
        adapter: Name of an adapter that changes it a lot.
        context: Most tokens of prompt and completion.

    Returns:
        Whether the log-probabilities are the same but for rounding.
    """
    length = _TOKENS if context is None else min(_TOKENS, context - len(_PROMPT))
    (alone,) = ask([_request(base, length)])
    beside = ask([_request(name, length) for name in [adapter, base] * _BESIDE])[1::2]
    return all(_gap(alone.logps, other.logps) < ROUNDING for other in beside)


def _gap(logps: list[float], others: list[float]) -> float:
    return sum(abs(one - other) for one, other in zip(logps, others, strict=True)) / len(logps)


def _request(name: str, length: int) -> dict[str, Any]:
    """Ask for a completion of one token only, over and over, so that all of them can be compared."""
    forced = {"allowed_token_ids": [_TOKEN], "temperature": 0.0, "repetition_penalty": 1.0, "seed": 0}
    ends = {"max_tokens": length, "ignore_eos": True, "stop": [], "stop_token_ids": []}
    return {"model": name, "prompt": _PROMPT, **forced, **ends, "logprobs": 0, "return_token_ids": True}
