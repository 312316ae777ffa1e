"""Checks and tokenizes prompts, from a row's text or messages to the token ids that the policy continues."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xpo_lightning.core.batch import Prompts, RawPrompt, left_pad
from xpo_lightning.core.errors import InputError

Truncation = Literal["left", "drop", "error"]


def check_prompt(prompt: Any, where: str) -> None:
    """Refuse a prompt that is neither text nor a conversation.

    Args:
        prompt: The row's value.
        where: File and row, for the error.

    Raises:
        InputError: The prompt is missing, empty, or of another type.
    """
    if prompt is None:
        raise InputError(f"{where}: the prompt is null; give text or a list of chat messages, or delete the row")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt is empty; give text, or delete the row")
        check_characters(prompt, where)
        return
    if not isinstance(prompt, list):
        raise InputError(
            f"{where}: the prompt must be text or a list of chat messages, "
            f"but is {type(prompt).__name__} ({prompt!r:.60})"
        )
    if not prompt:
        raise InputError(f"{where}: the prompt is an empty list of messages; give at least one, or delete the row")
    for message in prompt:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{where}: a chat message must be a mapping with text under 'role' and 'content', "
                f"but is {message!r:.80}"
            )
        for text in texts:
            check_characters(str(text), where)


def check_characters(text: str, where: str, what: str = "the prompt") -> None:
    """Refuse lone surrogates, which JSON can hold as an escape and no tokenizer accepts.

    Args:
        text: The text.
        where: File and row, for the error.
        what: What the text is, for the error.

    Raises:
        InputError: It holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {what} holds {text[error.start]!r}, half of a character (a lone surrogate); "
            f"mend the text, or delete the row"
        ) from error


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts for the policy.

    Text is tokenized with the tokenizer's defaults, but without the trailing EOS that some of them add. Chat messages
    go through the tokenizer's chat template with `add_generation_prompt`; a conversation that ends with an assistant's
    message is continued instead.

    Args:
        tokenizer: The policy's tokenizer.
        limit: Most tokens that a prompt may have: the model's context less the new tokens. None if it has no limit.
        embedded: How many token ids the model embeds; None if that is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int | None = None
    embedded: int | None = None

    def __call__(self, prompt: RawPrompt, where: str = "prompt") -> list[int]:
        """Tokenize one prompt.

        Args:
            prompt: Text or chat messages.
            where: File and row, for errors.

        Returns:
            Token ids, at least one.

        Raises:
            InputError: The prompt is malformed, or the tokenizer has no chat template for a conversation.
        """
        check_prompt(prompt, where)
        ids = self._encode_text(prompt) if isinstance(prompt, str) else self._encode_messages(prompt, where)
        if not ids:
            raise InputError(f"{where}: the prompt has no tokens; give text, or delete the row")
        return ids

    def encode_all(self, prompts: Sequence[RawPrompt]) -> list[list[int]]:
        """Tokenize the prompts of a batch, which must fit the model's context.

        Raises:
            InputError: A prompt is malformed or too long.
        """
        named = [(prompt, f"prompt {number} of a batch") for number, prompt in enumerate(prompts, 1)]
        return [self.fitting(self(prompt, where), where) for prompt, where in named]

    def check_all(self, rows: Sequence[list[int]]) -> Sequence[list[int]]:
        """Return rows that were tokenized elsewhere, if none is empty and the model's context holds each.

        Raises:
            InputError: A row is empty or too long.
        """
        for number, row in enumerate(rows, 1):
            if not len(row):
                raise InputError(f"prompt {number} of a batch has no tokens in 'prompt_ids'")
            self.fitting(row, f"prompt {number} of a batch")
        return rows

    def check_embedded(self, ids: Tensor) -> None:
        """Refuse token ids (B, P) that the model does not embed.

        Raises:
            InputError: There is one.
        """
        unknown = (ids < 0) | (ids >= (self.embedded or math.inf))
        if unknown.any():
            row, column = unknown.nonzero()[0].tolist()
            raise InputError(
                f"prompt {row + 1} of a batch has the token {int(ids[row, column])} in 'prompt_ids', and the model "
                f"embeds {self.embedded} tokens; tokenize it with the policy's tokenizer"
            )

    def truncate(
        self, prompt: RawPrompt, ids: list[int], max_tokens: int | None, rule: Truncation, where: str
    ) -> list[int] | None:
        """Apply the length limits to one prompt.

        Args:
            prompt: Text or chat messages.
            ids: Its token ids.
            max_tokens: Most tokens to keep, `data.max_prompt_tokens`; None if only the context sets a limit.
            rule: What to do with a longer prompt.
            where: File and row, for errors.

        Returns:
            The ids to use, or None if the prompt is dropped.

        Raises:
            InputError: The prompt is longer than `max_tokens` and the rule is "error", or longer than the context
                allows; or nothing of the text would be left.
        """
        if max_tokens is not None and len(ids) > max_tokens:
            if rule == "drop":
                return None
            if rule == "error":
                raise InputError(
                    f"{where}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens={max_tokens}; "
                    f"shorten it, or set data.truncate to left or drop"
                )
            ids = self._cut_left(prompt, ids, max_tokens, where)
        return self.fitting(ids, where)

    def fitting(self, ids: list[int], where: str) -> list[int]:
        """Return the ids if the model's context has room for them and the new tokens.

        Raises:
            InputError: It has not.
        """
        if self.limit is not None and len(ids) > self.limit:
            raise InputError(
                f"{where}: the prompt's {len(ids)} tokens and model.sampling.max_new_tokens exceed the context, "
                f"which leaves {self.limit} tokens for a prompt; set data.max_prompt_tokens to {self.limit} or less "
                f"with data.truncate left or drop, or lower model.sampling.max_new_tokens"
            )
        return ids

    def _cut_left(self, prompt: RawPrompt, ids: list[int], max_tokens: int, where: str) -> list[int]:
        """Keep the end of a prompt, and special tokens that the tokenizer puts in front of any text, such as BOS.

        The special tokens of a chat template count as text.
        """
        head = self._count_added_in_front(prompt) if isinstance(prompt, str) else 0
        if head >= max_tokens:
            raise InputError(
                f"{where}: data.max_prompt_tokens={max_tokens} leaves no room for text beside the {head} special "
                f"tokens that the tokenizer puts in front of it; set it to {head + 1} or more"
            )
        return [*ids[:head], *ids[head - max_tokens :]]

    def _count_added_in_front(self, text: str) -> int:
        encoded = self.tokenizer(text, return_special_tokens_mask=True, verbose=False)
        return [*encoded["special_tokens_mask"], 0].index(0)

    def _encode_text(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if not bare or bare[-1] != ids[-1]:
                ids.pop()
        return ids

    def _encode_messages(self, messages: list[dict[str, Any]], where: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{where}: the prompt is a conversation, but the policy's tokenizer has no chat template; "
                f"set model.policy.chat_template, or give prompts as text"
            )
        to_continue = messages[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not to_continue, continue_final_message=to_continue
            )
        except Exception as error:  # A template is a program, and may fail in any way.
            raise InputError(f"{where}: the policy's chat template refuses the conversation: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _uncollated(prompts: Any) -> Any:
    """Return the conversations of a batch that DataLoader's own `collate_fn` has turned inside out.

    It makes of B conversations of M messages each a list of M messages that hold B roles and B contents.
    """
    messages = prompts if isinstance(prompts, list | tuple) else []
    if not messages or not all(isinstance(one, Mapping) for one in messages):
        return prompts
    if not all(isinstance(value, list | tuple) for one in messages for value in one.values()):
        return prompts
    size = len(next(iter(messages[0].values())))
    return [[{name: values[row] for name, values in one.items()} for one in messages] for row in range(size)]


def as_prompts(batch: Any, encoder: PromptTokenizer, device: torch.device) -> Prompts:
    """Turn a batch from a data loader into tokenized prompts.

    Args:
        batch: A mapping of columns, `prompt` among them and `prompt_ids` if they are tokenized, or a list of prompts.
        encoder: Tokenizes prompts that are not tokenized yet.
        device: Device of the tokens.

    Raises:
        InputError: The batch has no prompts, or a prompt is malformed, too long, or not of the policy's tokens.
    """
    columns = dict(batch) if isinstance(batch, Mapping) else {"prompt": batch}
    columns["prompt"] = _uncollated(columns.get("prompt"))
    if columns["prompt"] is None:
        del columns["prompt"]
        raise InputError(f"a batch needs the key 'prompt', but has {sorted(columns)}; see data.prompt_column")
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(f"'{name}' of a batch must be a list with one entry a prompt, but is {values!r:.60}")
        if len(values) != len(columns["prompt"]):
            raise InputError(f"'{name}' of a batch has {len(values)} entries for {len(columns['prompt'])} prompts")
    if not len(columns["prompt"]):
        raise InputError("a batch has no prompts; leave empty batches out")
    raw, rows = columns.pop("prompt"), columns.pop("prompt_ids", None)
    ids, mask = left_pad(encoder.encode_all(raw) if rows is None else encoder.check_all(rows))
    encoder.check_embedded(ids)
    others = {name: tuple(values) for name, values in columns.items()}
    return Prompts(ids.to(device), mask.to(device), tuple(raw), others)
