"""Base class of judges that ask a language model: builds the questions, orders the completions, reads the verdicts."""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Judge, OnInvalid

VERDICTS = ("A", "B")
"""The model's answers: the completion shown first is better, or the one shown second."""
TEMPLATE = """\
Below are a prompt and two completions of it, A and B. Which completion is better?

Prompt:
{prompt}

Completion A:
{first}

Completion B:
{second}

Say which completion is better with one letter, A or B, and nothing else."""
_PLACES = ("prompt", "first", "second")


class PromptedJudge(Judge):
    """Asks a language model about each pair, with a question whose answer is one letter.

    A hash of the texts decides which completion is shown first, so the order favours neither side, and is the same in a
    resumed run and on any number of processes.

    Args:
        template: The question, with `{prompt}`, `{first}` and `{second}` in it, to be answered with A or B.
        both_orders: Whether to ask twice, the second time with the completions exchanged, and take the mean.
        invalid: See `Judge`.

    Raises:
        InputError: The template lacks one of the three placeholders.
    """

    def __init__(self, template: str = TEMPLATE, both_orders: bool = False, invalid: OnInvalid = "skip") -> None:
        super().__init__(invalid)
        missing = [name for name in _PLACES if f"{{{name}}}" not in template]
        if missing:
            raise InputError(f"model.reward.init_args.template must have {{{missing[0]}}} in it, where that text goes")
        self.template, self.both_orders = template, both_orders

    @abstractmethod
    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """Ask the model N questions.

        Args:
            questions: N questions.

        Returns:
            Probability of A against B for each question; None if there is no usable answer. Length N.
        """

    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """See `Judge.compare`; the columns are not used."""
        pairs = list(zip(prompts, firsts, seconds, strict=True))
        exchanged = [is_exchanged(*pair) for pair in pairs]
        said = self._probabilities(pairs, exchanged)
        if self.both_orders:
            said = (said + self._probabilities(pairs, [not one for one in exchanged])) / 2
        return said

    def _probabilities(self, pairs: Sequence[tuple[RawPrompt, str, str]], exchanged: Sequence[bool]) -> Tensor:
        """Ask about each pair in the given order; return the probability that its first completion is better, (B,)."""
        questions = [
            self._question(prompt, *((second, first) if swap else (first, second)))
            for (prompt, first, second), swap in zip(pairs, exchanged, strict=True)
        ]
        said = [float("nan") if one is None else one for one in self.ask(questions)]
        return torch.tensor([1 - one if swap else one for one, swap in zip(said, exchanged, strict=True)])

    def _question(self, prompt: RawPrompt, first: str, second: str) -> str:
        texts = {"prompt": format_prompt(prompt), "first": first, "second": second}
        # In one pass, so that a placeholder's name within a text is not replaced.
        return re.sub("|".join(f"{{{name}}}" for name in _PLACES), lambda found: texts[found[0][1:-1]], self.template)


def is_exchanged(prompt: RawPrompt, first: str, second: str) -> bool:
    """Return whether to show two completions exchanged; a hash decides, so both argument orders show the same order."""
    one, other = sorted((first, second))
    shown = (one, other)[hashlib.sha256(json.dumps([prompt, one, other]).encode()).digest()[0] & 1]
    return shown != first


def format_prompt(prompt: RawPrompt) -> str:
    """Format a prompt as plain text, and a conversation as its messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
