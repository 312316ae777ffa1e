"""The same prompts, tokenized for each of two writers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpo_lightning.batch import RawPrompt
from xpo_lightning.data.encoding import Encoding
from xpo_lightning.data.files import Located
from xpo_lightning.errors import InputError
from xpo_lightning.prompts import PromptEncoder


@dataclass(frozen=True)
class Encoded:
    """B prompts as one writer takes them.

    Args:
        ids: Token ids of each.
        raw: Each as the row gave it.
        columns: The rows' other columns, each of length B.
    """

    ids: list[list[int]]
    raw: tuple[RawPrompt, ...]
    columns: dict[str, tuple[Any, ...]]


def encoded_for(
    encoders: Sequence[PromptEncoder], rows: Sequence[Located], encoding: Encoding, name: str
) -> list[Encoded]:
    """Tokenize rows for several writers, and keep those that all of them take.

    Args:
        encoders: One for each writer.
        rows: The rows.
        encoding: The column of the prompts, and the limits on their length.
        name: What to call the rows in messages.

    Raises:
        InputError: A row cannot be used, or no row suits all writers.
    """
    kept = [
        {place: (row, ids) for place, row, ids in replace(encoding, encoder=encoder).encode(rows, name, report=False)}
        for encoder in encoders
    ]
    places = sorted(set.intersection(*(set(each) for each in kept)))
    if not places:
        raise InputError(f"{name}: no prompt suits both writers; all are dropped for their length by one or the other")
    column = encoding.prompt_column
    found = [kept[0][place][0] for place in places]
    raw = tuple(row[column] for row in found)
    columns = {other: tuple(row[other] for row in found) for other in found[0] if other != column}
    return [Encoded([each[place][1] for place in places], raw, columns) for each in kept]
