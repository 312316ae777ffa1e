"""Decodes completions to text, as they read after their prompts."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xpo_lightning.core.batch import Prompts

SHORT_END = 16
"""Number of a prompt's last tokens that are decoded with its completion, unless they form no complete text."""
HALF = "\ufffd"
"""The character that tokenizers put in place of bytes that form no character."""


class CompletionDecoder:
    """Decodes completions after their prompts, so that prompt and text together read as the model wrote them.

    SentencePiece tokenizers put a space before any text, and when they decode, they remove a leading space as that one.
    A completion that is decoded alone therefore loses the space before its first word. So the end of the prompt is
    decoded with the completion, and then removed. After a chat template's header, everything is text, spaces included.
    Spaces are not cleaned up: the model wrote a space before a full stop if there is one.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Token ids that end a completion, which are not part of its text.
        stop_strings: A text is cut before the first occurrence of any of these.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self.tokenizer, self.eos_token_ids, self.stop_strings = tokenizer, eos_token_ids, stop_strings
        self._adding: dict[int, bool] = {}

    def decode_all(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        """Decode completions without special tokens, each cut before the first stop string in it.

        Args:
            prompts: B prompts.
            ids: Token ids. (B, T)
            mask: True on the tokens of a completion, at least one in each row. (B, T)

        Returns:
            B texts.
        """
        rows = zip(self.read_ends(prompts), ids.tolist(), mask.sum(1).tolist(), strict=True)
        return tuple(self.decode(end, row[:length]) for end, row, length in rows)

    def read_ends(self, prompts: Prompts) -> list[list[int]]:
        """Return the last tokens of each prompt that its completion is decoded with. Length B.

        These are the last `SHORT_END` tokens if they decode to complete characters, and all tokens otherwise.
        """
        ends = [row[-count:] for row, count in zip(prompts.ids[:, -SHORT_END:].tolist(), prompts.counts, strict=True)]
        for row, end in enumerate(ends):
            text = self._decode(end, skip_special=True)
            if prompts.counts[row] > SHORT_END and (not text or HALF in text):
                ends[row] = prompts.ids[row][prompts.mask[row]].tolist()
        return ends

    def decode(self, end: list[int], row: list[int]) -> str:
        """Decode one completion.

        Args:
            end: The last tokens of its prompt, as `read_ends` returns them.
            row: Token ids of the completion, at least one.
        """
        kept = row[:-1] if row[-1] in self.eos_token_ids else row
        # A stop string may contain special tokens, so it is searched for in the text that still shows them.
        whole = self.decode_behind(end, kept, skip_special=False) if self.stop_strings else ""
        text, stop = cut_at_stop(whole, self.stop_strings)
        if not stop:
            return self.decode_behind(end, kept)
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(token.content, "") if token.special else text
        return text

    def decode_behind(self, end: list[int], row: list[int], skip_special: bool = True) -> str:
        """Decode tokens as they read after other tokens.

        Args:
            end: Token ids that come before, at least one.
            row: Token ids to decode.
            skip_special: Whether to leave special tokens out.
        """
        before, both = (self._decode(ids, skip_special) for ids in (end, [*end, *row]))
        # If the prompt ends within a character, the completion may complete it.
        known = next((text for text in (before, before.rstrip(HALF)) if both.startswith(text)), None)
        if known is None:
            # The first bytes changed how the prompt's end decodes. No space is lost there: decode the row alone.
            return self._decode(row, skip_special)
        text = both[len(known) :]
        return text[1:] if text.startswith(" ") and self._adds_space_behind(end[-1]) else text

    def _adds_space_behind(self, token: int) -> bool:
        """Return whether the tokenizer itself puts a space before a text that follows this token.

        Some tokenizers put one not only before the first text but before any text after a special token.
        """
        if token not in self._adding:
            added = self.tokenizer.added_tokens_decoder.get(token)
            self._adding[token] = added is not None and self._reads_with_space(token, added.content)
        return self._adding[token]

    def _reads_with_space(self, token: int, content: str) -> bool:
        letter, both = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"{content}a"))
        if both[:1] != [token]:
            return False
        before = self._decode([*letter, token], skip_special=True)
        return self._decode([*letter, *both], skip_special=True)[len(before) :].startswith(" ")

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, str]:
    """Cut a text before the first stop string in it; return the text and that stop string, or "" if it has none."""
    found = [(place, stop) for stop in stop_strings if (place := text.find(stop)) >= 0]
    place, stop = min(found, default=(len(text), ""))
    return text[:place], stop
