"""`VerifierReward`: scores a completion by whether its answer is the row's."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.verifier.process import VerifierProcess

Verifier = Literal["math", "reasoning_gym", "exact"]
_PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}
_KEY = "model.reward.init_args"


class VerifierReward(Reward):
    """Scores a completion by whether its answer is the right one, which a column of the row has.

    A wrong answer scores 0 and a right one 1; `reasoning_gym`'s scorers also give parts of it. The verifier runs in a
    process of its own with limits on time and memory: an answer that exceeds them is wrong.

    Args:
        verifier: `math` compares numbers, expressions and LaTeX by their value (package math-verify); `reasoning_gym`
            is the scorer of the task that the row's metadata names (package reasoning-gym); `exact` compares texts.
        answer_column: Column with the right answer.
        metadata_column: Column with reasoning-gym's metadata.
        pattern: Regular expression whose first group is the answer, such as `<answer>(.*?)</answer>`; the last match
            counts, and a dot matches line breaks. A completion without a match is wrong. null takes the completion.
        format_score: Added if the completion matches `pattern`, right or wrong.
        timeout: Seconds that verifying one completion may take.

    Raises:
        InputError: A value is out of range, the pattern has no group, or the verifier's package is not installed.
    """

    def __init__(
        self,
        verifier: Verifier = "math",
        answer_column: str = "answer",
        metadata_column: str = "metadata",
        pattern: str | None = None,
        format_score: float = 0.0,
        timeout: float = 5.0,
    ) -> None:
        super().__init__()
        if verifier not in get_args(Verifier):
            raise InputError(f"{_KEY}.verifier must be one of {', '.join(get_args(Verifier))}, but is {verifier!r}")
        package = _PACKAGES.get(verifier)
        if package is not None and find_spec(package) is None:
            name = package.replace("_", "-")
            raise InputError(f"{_KEY}.verifier={verifier} needs the package {name}; run: pip install {name}")
        check_range(f"{_KEY}.timeout", timeout, above=0, is_finite=True)
        if pattern is None and format_score:
            raise InputError(f"{_KEY}.format_score is for completions that match {_KEY}.pattern, which is null; set it")
        self.verifier, self.answer_column, self.metadata_column = verifier, answer_column, metadata_column
        self.pattern, self.format_score, self.timeout = pattern, format_score, timeout
        self._expression = None if pattern is None else _compiled(pattern)
        self._process = VerifierProcess(verifier, timeout)
        self._has_warned = False

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Verify the completions.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            The scores, float32. (B,)

        Raises:
            InputError: A row has no answer or no metadata, or the verifier does not start.
        """
        answers = self._column(columns, self.answer_column, "answer_column")
        metadata: Sequence[Any] = [None] * len(completions)
        if self.verifier == "reasoning_gym":
            metadata = self._column(columns, self.metadata_column, "metadata_column")
        rows = zip(completions, answers, metadata, strict=True)
        return torch.tensor([self._of_row(*row) for row in rows], dtype=torch.float32)

    def _of_row(self, completion: str, answer: Any, metadata: Any) -> float:
        given, matched = completion, 0.0
        if self._expression is not None:
            found = list(self._expression.finditer(completion))
            if not found:
                return 0.0
            given, matched = found[-1][1] or "", self.format_score
        score = self._process.score(given, answer, metadata, self.check)
        if score is None and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{_KEY}.verifier={self.verifier} gave no verdict on {given[:100]!r} within {self.timeout:g} seconds, "
                f"or failed on it: it counts as wrong, and so do later ones"
            )
        return matched + (score or 0.0)

    def _column(self, columns: Mapping[str, Sequence[Any]], name: str, option: str) -> Sequence[Any]:
        if name not in columns:
            raise InputError(
                f"{_KEY}.{option}={name}: the rows have no such column, but {', '.join(sorted(columns)) or 'none'}; "
                f"name one of them, or add it to data.source"
            )
        missing = next((row for row, value in enumerate(columns[name]) if value is None), None)
        if missing is not None:
            raise InputError(
                f"{_KEY}.{option}={name}: row {missing + 1} of a batch has none; remove it from data.source"
            )
        return columns[name]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"{_KEY}.pattern={pattern!r} is no regular expression: {error}") from error
    if expression.groups < 1:
        raise InputError(f"{_KEY}.pattern={pattern!r} has no group; put parentheses around the answer")
    return expression
