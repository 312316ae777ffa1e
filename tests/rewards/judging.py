"""Pairs that tests of judges share, and a short way to ask about them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.rewards.base import Judge

SHORT = "{prompt}|{first}|{second}"
PROMPTS = [f"the cat number {number}" for number in range(200)]
GOOD, BAD = [f"good {number}" for number in range(200)], [f"bad {number}" for number in range(200)]


def ask(judge: Judge, prompts: Sequence[RawPrompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    result: Tensor = judge(prompts, firsts, seconds, {})
    assert result.dtype == torch.float32
    return result.tolist()
