"""Takes the prompt of a preference pair from what its two completions have in common."""

from itertools import takewhile
from typing import Any

from xpo_lightning.core.errors import InputError

PAIR = {"chosen", "rejected"}
"""The columns of a preference data set."""
_ANSWER = "\n\nAssistant:"  # begins each answer in data sets that write conversations as one text


def has_implicit_prompt(columns: Any) -> bool:
    """Tell whether rows are preference pairs without a prompt of their own."""
    return columns >= PAIR and "prompt" not in columns


def with_prompt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a preference pair with its prompt.

    The prompt of two conversations is the messages that they begin with; that of two texts ends with the last
    `Assistant:` in the text that they begin with.

    Args:
        row: The row, with `chosen` and `rejected`.
        where: File and row, for the error.

    Raises:
        InputError: The prompt cannot be told from the completions.
    """
    sides = [row["chosen"], row["rejected"]]
    prompt: Any = None
    if all(isinstance(side, list) for side in sides):
        prompt = _common_beginning(*(side[:-1] for side in sides))
    elif all(isinstance(side, str) for side in sides):
        begin, answer, _ = _common_beginning(*sides).rpartition(_ANSWER)
        prompt = begin + answer
    if not prompt:
        raise InputError(
            f"data.source: {where} has 'chosen' and 'rejected' but no 'prompt', and the two do not say where the "
            f"prompt ends; add a column 'prompt', or give both as lists of chat messages"
        )
    return {"prompt": prompt, **row}


def _common_beginning(one: Any, other: Any) -> Any:
    """Return what two texts, or two lists, begin with."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[:same]
