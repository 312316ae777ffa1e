"""Turns completions that arrive as text, such as those of a Python function, into tokens."""

from collections.abc import Sequence

from xpo_lightning.core.batch import Completions, Prompts, stack_completions
from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.decoding import CompletionDecoder, cut_at_stop


def given_completions(texts: Sequence[str], prompts: Prompts, decoder: CompletionDecoder, most: int) -> Completions:
    """Tokenize completions.

    Args:
        texts: B completions. One that contains a stop string ends with it, and leaves it out of its text; any other
            ends with the decoder's first EOS token, if there is one.
        prompts: The B prompts that are completed.
        decoder: Has the policy's tokenizer, the EOS token ids and the stop strings.
        most: Maximum number of tokens of a completion, EOS included; longer ones are cut, and have not ended.

    Returns:
        B completions on the device of the prompts; their token log-probabilities are NaN, since the source gives none.

    Raises:
        InputError: A completion has no token.
    """
    rows, ended, shown = [], [], []
    for text, prompt_end in zip(texts, decoder.read_ends(prompts), strict=True):
        kept, stop = cut_at_stop(text, decoder.stop_strings)
        ids = [*_tokenized(kept + stop, prompt_end, decoder), *([] if stop else decoder.eos_token_ids[:1])]
        if not ids:
            raise InputError("a sampler wrote an empty completion, and there is no EOS token to end it with")
        ended.append(len(ids) <= most)
        rows.append(ids[:most])
        shown.append(kept if ended[-1] else decoder.decode_behind(prompt_end, ids[:most]))
    return stack_completions(rows, ended, shown).to(prompts.ids.device)


def _tokenized(text: str, prompt_end: list[int], decoder: CompletionDecoder) -> list[int]:
    """Tokenize a text so that it decodes to itself after its prompt, if the tokenizer can do so.

    Many tokenizers put a space before any text, but not after a line break. If the tokens of the text alone do not
    decode to it, tokenize it after a line break, and drop the tokens of the line break.
    """
    alone = _encode(text, decoder)
    if decoder.decode_behind(prompt_end, alone) == text:
        return alone
    line_break = _encode("\n", decoder)
    behind = _encode("\n" + text, decoder)[len(line_break) :]
    return behind if decoder.decode_behind(prompt_end, behind) == text else alone


def _encode(text: str, decoder: CompletionDecoder) -> list[int]:
    # A text that contains the name of a special token is still ordinary text.
    return list(decoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
