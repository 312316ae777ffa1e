"""A judge that is a Python function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.batch import RawPrompt
from xpo_lightning.identity import import_path
from xpo_lightning.rewards.asking import is_exchanged
from xpo_lightning.rewards.base import Judge, OnInvalid
from xpo_lightning.rewards.calls import UserFunction
from xpo_lightning.rewards.checks import as_probabilities

_GIVEN = ("prompts", "firsts", "seconds", "columns")


class PythonJudge(Judge):
    """Compares completions with a function: `function(prompts=[...], firsts=[...], seconds=[...], columns={...}, ...)`.

    The function gets B prompts (text or chat messages), two completions of each as text and the rows' other columns,
    each a list of length B. It returns B probabilities that the first is the better one, as a list, tensor or numpy
    array: True counts as 1 and False as 0, and None or NaN says that it has no answer. It is never asked about two
    completions of the same text.

    It runs in a thread of its own, always the same one, so that a call that hangs ends the run and not the patience
    of whoever waits for it.

    Args:
        function: The function; in YAML its import path, for example `my_judges.shorter`.
        arguments: Further keyword arguments of the function.
        timeout: How many seconds a call may take before the run ends with an error; null waits for ever.
        shuffle: Which completion comes first is decided by a hash of the texts, so that a function that likes the
            first favours neither side; off, the policy's own comes first.
        invalid: What becomes of a pair where the judge gave no usable answer: `skip` leaves it out of the preference
            loss, `tie` takes it for undecided, `error` ends the run.

    Raises:
        InputError: The function cannot be called with these arguments, or `timeout` is not above 0.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: dict[str, Any] | None = None,
        timeout: float | None = 1800,
        shuffle: bool = True,
        invalid: OnInvalid = "skip",
    ) -> None:
        super().__init__(invalid)
        self.function = UserFunction("judge function", function, _GIVEN, arguments, timeout)
        self.shuffle = shuffle

    def identity(self) -> dict[str, Any]:
        """Name the function, its arguments and how it is asked; the function's code is not looked at."""
        return {
            "class": import_path(type(self)),
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
            Probability that the first is the better one; NaN where the function has no answer. (B,)

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
