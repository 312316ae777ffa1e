"""Turns rows of preference data sets into pairs, and batches of pairs into what the module trains on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xpo_lightning.core.batch import Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.data.implicit_prompts import PAIR, with_prompt
from xpo_lightning.data.prompts import PromptTokenizer, as_prompts, check_characters
from xpo_lightning.data.readers import Row

KEY = "preferences"
"""Under this key, a batch has the preference pairs that are trained on as they are."""
_SIDES = ("chosen", "rejected")


def as_pair(row: Row, prompt_column: str, where: str) -> Row:
    """Return a row of a preference data set with its completions as texts, without the prompt.

    A row has `chosen` and `rejected`, and mostly a prompt:

    - Prompt and completions are texts: the completions are what follows the prompt.
    - Each completion is a list of chat messages: the prompt's, if it has them, and one of the assistant. The prompt is
      a list of messages, or missing, or a text that the completions' messages hold.
    - There is no prompt: see `with_prompt`.

    Args:
        row: The row.
        prompt_column: The column with the prompt.
        where: File and row, for errors.

    Raises:
        InputError: The row has another form, a completion is empty, or both are the same.
    """
    for name in (name for name in _SIDES if name not in row):
        raise InputError(
            f"data.preferences: {where} has no column '{name}', but a preference pair has 'chosen' and 'rejected'; it "
            f"has {', '.join(map(repr, row)) or 'none':.300}"
        )
    sides = [row[name] for name in _SIDES]
    are_texts = all(isinstance(side, str) for side in sides)
    if not are_texts and not all(_is_chat(side) for side in sides):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' must both be text, or both be lists of chat messages with text under "
            f"'role' and 'content', but are {sides[0]!r:.60} and {sides[1]!r:.60}"
        )
    is_implicit = prompt_column not in row
    prompt = with_prompt(row, where)["prompt"] if is_implicit else row[prompt_column]
    if are_texts:
        texts = [side[len(prompt) :] for side in sides] if is_implicit else sides
    else:
        if isinstance(prompt, str):
            prompt = _chat_of(prompt, sides, where)
        texts = [_answer(name, side, prompt, where) for name, side in zip(_SIDES, sides, strict=True)]
    for name, text in zip(_SIDES, texts, strict=True):
        if not text.strip():
            raise InputError(f"{where}: '{name}' is empty; give text, or delete the row")
        check_characters(text, where, f"'{name}'")
    if texts[0] == texts[1]:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' are the same, which says nothing of preference; delete the row"
        )
    return {**row, prompt_column: prompt, **dict(zip(_SIDES, texts, strict=True))}


def _is_chat(side: Any) -> bool:
    return isinstance(side, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in side
    )


def _chat_of(prompt: str, sides: Sequence[list[Row]], where: str) -> list[Row]:
    """Return the messages that both completions begin with, in place of a prompt that is the text of one of them."""
    begin = sides[0][:-1]
    if begin != sides[1][:-1] or prompt not in [message["content"] for message in begin]:
        raise InputError(
            f"{where}: the prompt is text, and 'chosen' and 'rejected' are chat messages that do not both begin with "
            f"it; give all three as text, or all three as messages"
        )
    return begin


def _answer(name: str, side: list[Row], prompt: Any, where: str) -> str:
    """Return the assistant's answer in a list of messages, which may begin with the prompt's."""
    begins = isinstance(prompt, list) and side[: len(prompt)] == prompt
    rest = side[len(prompt) :] if begins else side
    if len(rest) > 1 and not begins:
        raise InputError(
            f"{where}: '{name}' has {len(side)} messages, and does not begin with those of the prompt; give it the "
            f"prompt's messages and the answer, or the answer alone"
        )
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in rest) or "none"
        raise InputError(
            f"{where}: '{name}' must have one message of the assistant after the prompt, but has {roles}; give the "
            f"answer alone, or delete the row"
        )
    return str(rest[0]["content"])


@dataclass(frozen=True)
class PreferencePairs:
    """A batch of preference pairs.

    Args:
        prompts: B prompts.
        chosen: The preferred completion of each, as text. Length B.
        rejected: The other completion of each, as text. Length B.
    """

    prompts: Prompts
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into the prompts to sample for and the preference pairs; None for what it does not have."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get(KEY), Mapping):
        return batch, None
    others = {name: values for name, values in batch.items() if name != KEY}
    return others or None, batch[KEY]


def held_out_pairs(batch: Any) -> dict[str, Any]:
    """Return a validation batch as one of preference pairs, for a module without a reward.

    Raises:
        InputError: Its rows are no pairs.
    """
    if not isinstance(batch, Mapping) or not batch.keys() >= PAIR:
        raise InputError(
            "model.reward is null, so that validation measures held-out preference pairs, but the validation rows have "
            "no 'chosen' and 'rejected'; hold pairs out by data.validation_size, name some in data.validation_source, "
            "or give a reward"
        )
    return {KEY: batch}


def as_preferences(batch: Any, encoder: PromptTokenizer, device: torch.device) -> PreferencePairs:
    """Turn a batch of pairs into tokenized prompts and texts.

    Args:
        batch: A mapping of columns: `prompt`, `chosen` and `rejected`, the last two as texts.
        encoder: Tokenizes prompts that are not tokenized yet.
        device: Device of the tokens.

    Raises:
        InputError: A column is missing, or does not hold texts.
    """
    columns = dict(batch) if isinstance(batch, Mapping) else {}
    for name in _SIDES:
        if name not in columns or not all(isinstance(text, str) for text in columns[name]):
            raise InputError(
                f"a batch of preference pairs needs texts under '{name}', but has {sorted(columns)}; data.preferences "
                f"gives them"
            )
    prompts = as_prompts({name: values for name, values in columns.items() if name not in PAIR}, encoder, device)
    for name in _SIDES:
        if len(columns[name]) != len(prompts):
            raise InputError(f"'{name}' of a batch has {len(columns[name])} entries for {len(prompts)} prompts")
    return PreferencePairs(prompts, tuple(columns["chosen"]), tuple(columns["rejected"]))
