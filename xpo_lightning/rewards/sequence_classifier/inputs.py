"""Renders a prompt and a completion as a reward model's input text, and tokenizes it, cut to the model's context."""

from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from xpo_lightning.core.batch import Messages, RawPrompt
from xpo_lightning.core.errors import InputError

PromptFormat = Literal["auto", "text", "chat"]


def render(
    prompt: RawPrompt, completion: str, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> tuple[str, bool]:
    """Join a prompt and its completion into the text that the reward model scores.

    Args:
        prompt: Text or chat messages.
        completion: The completion.
        tokenizer: The reward model's tokenizer, which has the chat template.
        prompt_format: "auto" joins text and renders chat messages; "chat" renders both; "text" only takes text.

    Returns:
        The text, and whether the chat template rendered it, which writes its own special tokens.

    Raises:
        InputError: The format does not suit the prompt, or there is no chat template, or it refuses the conversation.
    """
    if isinstance(prompt, str) and prompt_format != "chat":
        return prompt + completion, False
    if prompt_format == "text":
        raise InputError(
            "model.reward.init_args.prompt_format: 'text' cannot score chat messages; set it to auto, "
            "or give prompts as text"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"model.reward: the reward model's tokenizer '{tokenizer.name_or_path}' has no chat template to score a "
            f"conversation with; set model.reward.init_args.tokenizer to one that has, or give prompts as text"
        )
    try:
        text = tokenizer.apply_chat_template(
            conversation(prompt, completion), tokenize=False, add_generation_prompt=False
        )
    except TemplateError as error:
        raise InputError(f"model.reward: the reward model's chat template refuses a conversation ({error})") from error
    return str(text), True


def conversation(prompt: RawPrompt, completion: str) -> Messages:
    """Append a completion to its conversation.

    Args:
        prompt: Text, which becomes one user message, or chat messages.
        completion: The assistant's message; if the assistant spoke last, the rest of that message.

    Returns:
        A new list of messages that ends with the assistant's.
    """
    messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages and messages[-1]["role"] == "assistant":
        begun = messages.pop()
        return [*messages, {**begun, "content": begun["content"] + completion}]
    return [*messages, {"role": "assistant", "content": completion}]


Truncation = Literal["left", "right", "error"]


@dataclass(frozen=True)
class InputTokenizer:
    """Tokenizes text for a reward model.

    A row that is too long loses tokens of its text. The special tokens that the tokenizer puts around a text ([CLS],
    BOS, [SEP]) and an appended EOS stay, since a classifier reads its score there. The special tokens that a chat
    template wrote are part of the text.

    Args:
        tokenizer: The reward model's tokenizer.
        max_tokens: Maximum number of tokens of a row, special ones included; None is no limit.
        truncate: Which end of a longer text to cut: its left, its right, or neither ("error").
        append_eos: Whether to append EOS to a row that does not end with it.
        vocabulary: Number of token ids that the model knows.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    truncate: Truncation
    append_eos: bool
    vocabulary: int

    def __call__(self, text: str, is_chat: bool, row: int) -> list[int]:
        """Tokenize one text.

        Args:
            text: Prompt and completion.
            is_chat: Whether a chat template wrote the text, special tokens included.
            row: Index of the text in the batch, for errors.

        Returns:
            Token ids, at least one and no more than `max_tokens`.

        Raises:
            InputError: The row is empty, or too long and may not be cut, or has ids that the model does not know.
        """
        head, body, tail = self._parts(text, is_chat)
        ids = [*head, *self._cut(body, len(head) + len(tail), row), *tail]
        if not ids:
            raise InputError(f"model.reward: row {row} has no tokens: its prompt and its completion are both empty")
        if max(ids) >= self.vocabulary:
            raise InputError(
                f"model.reward.init_args.tokenizer: token id {max(ids)} is outside of the reward model's vocabulary of "
                f"{self.vocabulary}; the tokenizer '{self.tokenizer.name_or_path}' does not belong to the model"
            )
        return ids

    def _parts(self, text: str, is_chat: bool) -> tuple[list[int], list[int], list[int]]:
        encoded = self.tokenizer(
            text, add_special_tokens=not is_chat, return_special_tokens_mask=not is_chat, verbose=False
        )
        ids: list[int] = list(encoded["input_ids"])
        added: list[int] = [0] * len(ids) if is_chat else list(encoded["special_tokens_mask"])
        start = added.index(0) if 0 in added else len(ids)
        end = len(ids) - (added[::-1].index(0) if 0 in added else 0)
        tail = ids[end:]
        eos = self.tokenizer.eos_token_id
        if self.append_eos and ids[-1:] != [eos]:
            tail = [*tail, eos]
        return ids[:start], ids[start:end], tail

    def _cut(self, body: list[int], around: int, row: int) -> list[int]:
        if self.max_tokens is None or len(body) + around <= self.max_tokens:
            return body
        if self.truncate == "error":
            raise InputError(
                f"model.reward: row {row} has {len(body) + around} tokens, more than the reward model's limit of "
                f"{self.max_tokens}; set model.reward.init_args.truncate to left or right, or shorten the texts"
            )
        room = self.max_tokens - around
        if room < 1:
            raise InputError(
                f"model.reward.init_args.max_tokens: {self.max_tokens} leaves no room for text beside "
                f"{around} special tokens"
            )
        return body[-room:] if self.truncate == "left" else body[:room]
