"""Completions that something else than a model of ours wrote, as text."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from xpo_lightning.batch import Completions
from xpo_lightning.errors import InputError


def given_completions(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    stop_strings: Sequence[str],
    most: int,
    device: torch.device | str,
) -> Completions:
    """Tokenize completions.

    Args:
        texts: B completions.
        tokenizer: The policy's tokenizer.
        eos_token_ids: Token ids that end a completion; each gets the first, if there is one.
        stop_strings: A completion ends with the first of these in it, which is not part of its text, and needs no EOS.
        most: Most tokens of a completion, EOS included; longer ones are cut, and have not ended.
        device: Where they go.

    Returns:
        B completions; their writer's log-probabilities are NaN.

    Raises:
        InputError: One has no token.
    """
    rows, ended, shown = [], [], []
    for text in texts:
        kept, end = _stopped(text, stop_strings)
        # What looks like a special token in a text is text.
        ids = tokenizer(kept + end, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*ids, *([] if end else eos_token_ids[:1])]
        if not ids:
            raise InputError("a sampler wrote an empty completion, and there is no EOS token to end it with")
        ended.append(len(ids) <= most)
        rows.append(torch.tensor(ids[:most], dtype=torch.long))
        shown.append(kept if ended[-1] else str(tokenizer.decode(ids[:most], skip_special_tokens=True)))
    tokens = pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    logps = torch.zeros(tokens.shape).masked_fill(mask, torch.nan)
    return Completions(tokens, mask, torch.tensor(ended), tuple(shown), logps).to(device)


def _stopped(text: str, stop_strings: Sequence[str]) -> tuple[str, str]:
    """Cut a text before the stop string that comes first; return it, and the stop string, which may be none."""
    found = [(place, stop) for stop in stop_strings if (place := text.find(stop)) >= 0]
    place, stop = min(found, default=(len(text), ""))
    return text[:place], stop
