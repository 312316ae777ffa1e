"""Turns rows as read into prompts for the policy."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from xpo_lightning.core.errors import InputError
from xpo_lightning.data.implicit_prompts import PAIR
from xpo_lightning.data.prompts import PromptTokenizer, Truncation, check_prompt
from xpo_lightning.data.readers import LocatedRow, Row

Sample = dict[str, Any]
"""`prompt`, `prompt_ids` if there is an encoder, and the row's other columns."""


@dataclass(frozen=True)
class PromptPreprocessor:
    """Checks rows, and turns them into prompts with token ids.

    Args:
        prompt_column: The column that holds the prompt.
        encoder: Tokenizes prompts; None leaves them untokenized.
        max_tokens: Most tokens of a prompt; None sets no limit.
        truncate: What to do with a longer prompt.
    """

    prompt_column: str
    encoder: PromptTokenizer | None = None
    max_tokens: int | None = None
    truncate: Truncation = "error"

    def __post_init__(self) -> None:
        """Refuse a truncation rule without a limit."""
        if self.max_tokens is None and self.truncate != "error":
            raise InputError(f"data.truncate: '{self.truncate}' needs data.max_prompt_tokens, which is not set")

    def encode(
        self, rows: Iterable[LocatedRow], name: str, report: bool = True
    ) -> Iterator[tuple[int, Row, list[int]]]:
        """Check and tokenize rows, and apply the limits on their length.

        Args:
            rows: The rows.
            name: Name of the rows in messages.
            report: Log at the end how many prompts were dropped or truncated.

        Yields:
            For each prompt that is kept: its index in `rows`, the row, and the token ids (empty without an encoder).

        Raises:
            InputError: A row is malformed or too long, or no row is left.
        """
        total = kept = truncated = 0
        for total, (where, row) in enumerate(self._checked(rows), 1):
            ids, was_cut = self._tokenize(row[self.prompt_column], where)
            if ids is not None:
                kept += 1
                truncated += was_cut
                yield total - 1, row, ids
        if total == 0:
            raise InputError(f"{name}: there are no rows; give it some, or name another file")
        if kept == 0:
            raise InputError(
                f"{name}: all {total} were dropped, being longer than data.max_prompt_tokens={self.max_tokens}"
            )
        if report and (kept < total or truncated):
            rank_zero_info(
                f"{name}: of {total} prompts, {total - kept} were dropped and {truncated} truncated, "
                f"being longer than data.max_prompt_tokens={self.max_tokens}"
            )

    def sample(self, row: Row, ids: Sequence[int]) -> Sample:
        """Return a row's sample: the prompt, its token ids with an encoder, and the other columns."""
        others = {column: value for column, value in row.items() if column != self.prompt_column}
        encoded = {} if self.encoder is None else {"prompt_ids": list(ids)}
        return {"prompt": row[self.prompt_column], **encoded, **others}

    def _tokenize(self, prompt: Any, where: str) -> tuple[list[int] | None, bool]:
        if self.encoder is None:
            check_prompt(prompt, where)
            return [], False
        ids = self.encoder(prompt, where)
        fitting = self.encoder.truncate(prompt, ids, self.max_tokens, self.truncate, where)
        return fitting, fitting is not None and len(fitting) < len(ids)

    def _checked(self, rows: Iterable[LocatedRow]) -> Iterator[LocatedRow]:
        first: Row | None = None
        for where, row in rows:
            if first is None:
                first = row
                self._check_columns(list(row), where)
            elif row.keys() != first.keys():
                raise _other_columns(first, row, where)
            yield where, row

    def _check_columns(self, columns: list[str], where: str) -> None:
        if self.prompt_column in PAIR and set(columns) >= PAIR:
            raise InputError(
                f"data.prompt_column: '{self.prompt_column}' of {where} holds the answer too; remove the line: the "
                f"prompt is then taken from what 'chosen' and 'rejected' have in common"
            )
        if self.prompt_column not in columns:
            close = get_close_matches(self.prompt_column, columns, 1)
            chats = [name for name in ("messages", "conversations", "conversation") if name in columns]
            meant = [*close, *chats]
            hint = f" (did you mean '{meant[0]}'?)" if meant else ""
            raise InputError(
                f"data.prompt_column: {where} has no column '{self.prompt_column}'{hint}; "
                f"it has {_named(columns) or 'none'}"
            )
        for taken in {"prompt", "prompt_ids"} - {self.prompt_column}:
            if taken in columns:
                raise InputError(
                    f"{where} has a column '{taken}' beside the prompts in '{self.prompt_column}', "
                    f"but batches need that name; rename the column, or remove it"
                )


def _other_columns(first: Row, row: Row, where: str) -> InputError:
    lacking = _named([column for column in first if column not in row])
    added = _named([column for column in row if column not in first])
    differences = [f"lacks {lacking}"] * bool(lacking) + [f"adds {added}"] * bool(added)
    return InputError(
        f"{where}: this row {' and '.join(differences)}, unlike the first row; "
        f"give every row the same columns, with null where there is no value"
    )


def _named(columns: list[str]) -> str:
    """List column names, cut short because a file that is no table may have a very long first line."""
    named = ", ".join(map(repr, columns))
    return named if len(named) <= 300 else f"{named[:300]}..."
