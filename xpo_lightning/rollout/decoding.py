"""Completions as text: what was written, as it reads behind the prompt."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xpo_lightning.core.batch import Prompts

SHORT_END = 16
"""Tokens of a prompt that are decoded with its completion, if they are enough."""
HALF = "\ufffd"
"""How tokenizers show bytes that make no character."""


class CompletionDecoder:
    """Decodes completions behind their prompts, so that prompt and text together read as the model wrote them.

    Tokenizers of the SentencePiece kind put a space before any text, and take the first space of any text that they
    decode for that one. A completion that is decoded alone therefore loses the space before its first word. So the end
    of the prompt is decoded with the completion, and then left out. What follows a chat template's header is the text,
    spaces included. Spaces are not cleaned up: a space before a full stop was written by the model.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Token ids that end a completion, which are not part of its text.
        stop_strings: A text ends before the first of these in it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self.tokenizer, self.eos_token_ids, self.stop_strings = tokenizer, eos_token_ids, stop_strings
        self._adding: dict[int, bool] = {}

    def decode_all(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        """Decode completions, without special tokens and without what follows a stop string.

        Args:
            prompts: B prompts.
            ids: Token ids. (B, T)
            mask: True up to the last token, of which each row has one at least. (B, T)

        Returns:
            B texts.
        """
        rows = zip(self.read_ends(prompts), ids.tolist(), mask.sum(1).tolist(), strict=True)
        return tuple(self.decode(end, row[:length]) for end, row, length in rows)

    def read_ends(self, prompts: Prompts) -> list[list[int]]:
        """Return of each prompt as many of its last tokens as show what a completion is to be read behind.

        These are few where they read as whole characters; otherwise all. Length B.
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
            end: The last tokens of its prompt.
            row: Token ids of the completion, at least one.
        """
        kept = row[:-1] if row[-1] in self.eos_token_ids else row
        # A stop string may hold special tokens, so it is looked for while they still show.
        whole = self.decode_behind(end, kept, skip_special=False) if self.stop_strings else ""
        found = [position for stop in self.stop_strings if (position := whole.find(stop)) >= 0]
        if not found:
            return self.decode_behind(end, kept)
        text = whole[: min(found)]
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(token.content, "") if token.special else text
        return text

    def decode_behind(self, end: list[int], row: list[int], skip_special: bool = True) -> str:
        """Decode tokens as they read behind others.

        Args:
            end: Token ids that come before, at least one.
            row: Token ids to decode.
            skip_special: Leave special tokens out.
        """
        before, both = (self._decode(ids, skip_special) for ids in (end, [*end, *row]))
        # Where the prompt ends with half a character, the completion may have completed it.
        known = next((text for text in (before, before.rstrip(HALF)) if both.startswith(text)), None)
        if known is None:
            # Bytes that spoil the character before them; they follow no space that could be lost.
            return self._decode(row, skip_special)
        text = both[len(known) :]
        return text[1:] if text.startswith(" ") and self._adds_space_behind(end[-1]) else text

    def _adds_space_behind(self, token: int) -> bool:
        """Tell whether a text behind this token begins with a space that the tokenizer itself puts there.

        Some put one not only before the first text but before any text that follows a special token.
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
