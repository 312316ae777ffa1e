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
    most: int,
    device: torch.device | str,
) -> Completions:
    """Tokenize completions.

    Args:
        texts: B completions.
        tokenizer: The policy's tokenizer.
        eos_token_ids: Token ids that end a completion; each gets the first, if there is one.
        most: Most tokens of a completion, EOS included; longer ones are cut, and have not ended.
        device: Where they go.

    Returns:
        B completions; their writer's log-probabilities are NaN.

    Raises:
        InputError: One has no token.
    """
    rows, ended, shown = [], [], []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *eos_token_ids[:1]]
        if not ids:
            raise InputError("a sampler wrote an empty completion, and there is no EOS token to end it with")
        ended.append(len(ids) <= most)
        rows.append(torch.tensor(ids[:most], dtype=torch.long))
        shown.append(text if ended[-1] else str(tokenizer.decode(ids[:most], skip_special_tokens=True)))
    tokens = pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    logps = torch.zeros(tokens.shape).masked_fill(mask, torch.nan)
    return Completions(tokens, mask, torch.tensor(ended), tuple(shown), logps).to(device)
