"""Judges that are language models: what they are asked, in which order, and what their verdict means."""

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
"""What a model says when the completion shown first, or the one shown second, is the better one."""
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
    """A judge that puts each pair to a language model as a question whose answer is one letter.

    Which completion is shown first is decided by a hash of the texts, so it favours neither side, and is the same on a
    resumed run and on any number of processes.

    Args:
        template: The question, with `{prompt}`, `{first}` and `{second}` in it, to be answered with A or B.
        both_orders: Ask twice, the second time with the completions exchanged, and take the mean.
        invalid: See `Judge`.

    Raises:
        InputError: The template lacks a place for one of the three.
    """

    def __init__(self, template: str = TEMPLATE, both_orders: bool = False, invalid: OnInvalid = "skip") -> None:
        super().__init__(invalid)
        missing = [name for name in _PLACES if f"{{{name}}}" not in template]
        if missing:
            raise InputError(f"model.reward.init_args.template must have {{{missing[0]}}} in it, where that text goes")
        self.template, self.both_orders = template, both_orders

    @abstractmethod
    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """Put questions to the model.

        Args:
            questions: N questions.

        Returns:
            Probability of A against B, for each; None where there is no usable answer. Length N.
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
        """Ask about each pair in this order, and take the exchange out of what is said, (B,)."""
        questions = [
            self._question(prompt, *((second, first) if swap else (first, second)))
            for (prompt, first, second), swap in zip(pairs, exchanged, strict=True)
        ]
        said = [float("nan") if one is None else one for one in self.ask(questions)]
        return torch.tensor([1 - one if swap else one for one, swap in zip(said, exchanged, strict=True)])

    def _question(self, prompt: RawPrompt, first: str, second: str) -> str:
        texts = {"prompt": format_prompt(prompt), "first": first, "second": second}
        # In one go, so that a text which holds a place's name is left as it is.
        return re.sub("|".join(f"{{{name}}}" for name in _PLACES), lambda found: texts[found[0][1:-1]], self.template)


def is_exchanged(prompt: RawPrompt, first: str, second: str) -> bool:
    """Draw the order in which two completions are shown: always the same for the same two, whichever is the first."""
    one, other = sorted((first, second))
    shown = (one, other)[hashlib.sha256(json.dumps([prompt, one, other]).encode()).digest()[0] & 1]
    return shown != first


def format_prompt(prompt: RawPrompt) -> str:
    """Write a prompt down as plain text; of a conversation, each message with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
