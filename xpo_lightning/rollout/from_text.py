"""Completions that something else than a model of ours wrote, as text."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.decoding import CompletionDecoder


def given_completions(texts: Sequence[str], prompts: Prompts, decoder: CompletionDecoder, most: int) -> Completions:
    """Tokenize completions.

    Args:
        texts: B completions. Each ends with the decoder's first EOS token, if there is one; or else with the first stop
            string in it, which is not part of its text, and needs no EOS.
        prompts: B prompts, which the texts follow.
        decoder: Knows the policy's tokenizer, and what ends a completion.
        most: Most tokens of a completion, EOS included; longer ones are cut, and have not ended.

    Returns:
        B completions on the device of the prompts; their writer's log-probabilities are NaN.

    Raises:
        InputError: One has no token.
    """
    rows, ended, shown = [], [], []
    for text, prompt_end in zip(texts, decoder.read_ends(prompts), strict=True):
        kept, stop = _stopped(text, decoder.stop_strings)
        ids = [*_tokenized(kept + stop, prompt_end, decoder), *([] if stop else decoder.eos_token_ids[:1])]
        if not ids:
            raise InputError("a sampler wrote an empty completion, and there is no EOS token to end it with")
        ended.append(len(ids) <= most)
        rows.append(torch.tensor(ids[:most], dtype=torch.long))
        shown.append(kept if ended[-1] else decoder.decode_behind(prompt_end, ids[:most]))
    tokens = pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    logps = torch.zeros(tokens.shape).masked_fill(mask, torch.nan)
    return Completions(tokens, mask, torch.tensor(ended), tuple(shown), logps).to(prompts.ids.device)


def _tokenized(text: str, prompt_end: list[int], decoder: CompletionDecoder) -> list[int]:
    """Tokenize a text so that it reads the same behind its prompt, where the tokenizer can.

    Many tokenizers put a space before any text. Behind a line break they do not, and what they make of the line break
    is left out.
    """
    alone = _encode(text, decoder)
    if decoder.decode_behind(prompt_end, alone) == text:
        return alone
    line_break = _encode("\n", decoder)
    behind = _encode("\n" + text, decoder)[len(line_break) :]
    return behind if decoder.decode_behind(prompt_end, behind) == text else alone


def _encode(text: str, decoder: CompletionDecoder) -> list[int]:
    # What looks like a special token in a text is text.
    return list(decoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _stopped(text: str, stop_strings: Sequence[str]) -> tuple[str, str]:
    """Cut a text before the stop string that comes first; return it, and the stop string, which may be none."""
    found = [(place, stop) for stop in stop_strings if (place := text.find(stop)) >= 0]
    place, stop = min(found, default=(len(text), ""))
    return text[:place], stop
