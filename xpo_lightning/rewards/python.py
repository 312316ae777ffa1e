"""A reward and a judge that call a Python function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.fingerprint import recorded_path
from xpo_lightning.core.timed_call import TimedFunction
from xpo_lightning.rewards.base import Judge, OnInvalid, Reward
from xpo_lightning.rewards.llm_judge import is_exchanged
from xpo_lightning.rewards.validation import as_probabilities, as_scores

_SCORED = ("prompts", "completions", "columns")


class PythonReward(Reward):
    """Scores completions with a function: `function(prompts=[...], completions=[...], columns={...}, **arguments)`.

    The function gets B prompts (text or chat messages), B completions as text and the rows' other columns, each a list
    of length B. It returns B finite numbers as a list, tensor or numpy array; True counts as 1 and False as 0.

    It runs in a thread of its own, always the same one, so that a hanging call ends the run instead of blocking it
    forever.

    Args:
        function: The function; in YAML its import path or its file, for example `my_rewards.exact_match` or
            `path/to/my_rewards.py:exact_match`. The folder of the YAML file and the current folder are searched.
        arguments: Further keyword arguments of the function.
        timeout: How many seconds a call may take before the run ends with an error; null waits forever.

    Raises:
        InputError: The function cannot be called with these arguments, or `timeout` is not above 0.
    """

    def __init__(
        self, function: str | Callable[..., Any], arguments: dict[str, Any] | None = None, timeout: float | None = 1800
    ) -> None:
        super().__init__()
        self.function = TimedFunction("reward function", function, _SCORED, arguments, timeout)

    @property
    def timeout(self) -> float | None:
        """How many seconds a call may take; None waits forever."""
        return self.function.timeout

    def identity(self) -> dict[str, Any]:
        """Return the function's import path and arguments; changes to its code are not detected."""
        return {
            "class": recorded_path(type(self)),
            "function": self.function.name,
            "arguments": self.function.arguments,
        }

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Call the function.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            The scores, float32. (B,)

        Raises:
            InputError: The function raised, did not return in time, or did not return B finite numbers. The message
                names the function.
        """
        lists = {name: list(values) for name, values in columns.items()}
        values = self.function(self.check, prompts=list(prompts), completions=list(completions), columns=lists)
        return as_scores(values, len(completions), self.function.who)


_COMPARED = ("prompts", "firsts", "seconds", "columns")


class PythonJudge(Judge):
    """Compares completions with a function: `function(prompts=[...], firsts=[...], seconds=[...], columns={...}, ...)`.

    The function gets B prompts (text or chat messages), two completions of each as text and the rows' other columns,
    each a list of length B. It returns B probabilities that the first is better, as a list, tensor or numpy array: True
    counts as 1 and False as 0, and None or NaN means that it has no answer. It is never called for two completions with
    the same text.

    It runs in a thread of its own, always the same one, so that a hanging call ends the run instead of blocking it
    forever.

    Args:
        function: The function; in YAML its import path or its file, for example `my_judges.shorter` or
            `path/to/my_judges.py:shorter`. The folder of the YAML file and the current folder are searched.
        arguments: Further keyword arguments of the function.
        timeout: How many seconds a call may take before the run ends with an error; null waits forever.
        shuffle: Whether a hash of the texts decides which completion comes first, so that a function that prefers the
            first favours neither side; otherwise the policy's own comes first.
        invalid: What to do with a pair for which the judge gave no usable answer: `skip` leaves it out of the
            preference loss, `tie` counts it as a tie, `error` ends the run.

    Raises:
        InputError: The function cannot be called with these arguments, or `timeout` is not above 0.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        arguments: dict[str, Any] | None = None,
        timeout: float | None = 1800,
        shuffle: bool = True,
        invalid: OnInvalid = "skip",
    ) -> None:
        super().__init__(invalid)
        self.function = TimedFunction("judge function", function, _COMPARED, arguments, timeout)
        self.shuffle = shuffle

    def identity(self) -> dict[str, Any]:
        """Return the function's import path, its arguments and the options; changes to its code are not detected."""
        return {
            "class": recorded_path(type(self)),
            "function": self.function.name,
            "arguments": self.function.arguments,
            "shuffle": self.shuffle,
            "invalid": self.invalid,
        }

    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Call the function.

        Args:
            prompts: B prompts, text or chat messages.
            firsts: B completions.
            seconds: B others.
            columns: The rows' other columns, each of length B.

        Returns:
            Probability that the first is better; NaN if the function has no answer. (B,)

        Raises:
            InputError: The function raised, did not return in time, or did not return B probabilities. The message
                names the function.
        """
        triples = list(zip(prompts, firsts, seconds, strict=True))
        exchanged = [self.shuffle and is_exchanged(*triple) for triple in triples]
        shown = [(two, one) if swap else (one, two) for (_, one, two), swap in zip(triples, exchanged, strict=True)]
        values = self.function(
            self.check,
            prompts=list(prompts),
            firsts=[pair[0] for pair in shown],
            seconds=[pair[1] for pair in shown],
            columns={name: list(values) for name, values in columns.items()},
        )
        said = as_probabilities(values, len(triples), self.function.who)
        return torch.where(torch.tensor(exchanged, dtype=torch.bool), 1 - said, said)
