"""Log-probabilities of completions under a causal language model."""

import torch
from torch import Tensor, nn

from xpo_lightning.batch import Completions, Pair, Prompts
from xpo_lightning.forward import last_logits, positions_from


def token_logps(model: nn.Module, prompts: Prompts, completions: Completions) -> Tensor:
    """Score the tokens of completions, at temperature 1 over the full vocabulary.

    Args:
        model: A transformers causal language model on the device of the prompts. Gradients flow where they are enabled.
        prompts: B prompts.
        completions: B completions of them.

    Returns:
        Natural log-probability of each completion token, in float32; 0 on padding. (B, T)
    """
    ids = torch.cat([prompts.ids, completions.ids], 1)  # (B, P + T)
    mask = torch.cat([prompts.mask, completions.mask], 1)
    length = completions.ids.shape[1]
    # Position P - 1 + t predicts completion token t: the prompt's last position up to the last but one.
    logits = last_logits(model, ids, mask, positions_from(mask), keep=length + 1)[:, :-1]  # (B, T, V)
    logps = logits.float().log_softmax(-1).gather(2, completions.ids[:, :, None])[:, :, 0]
    return torch.where(completions.mask, logps, 0.0)


def pair_logps(model: nn.Module, prompts: Prompts, completions: Pair[Completions]) -> Pair[Tensor]:
    """Score both completions of each prompt in one forward pass of 2B rows.

    Args:
        model: As in `token_logps`.
        prompts: B prompts.
        completions: B completions a side.

    Returns:
        Log-probability of each completion, summed over its tokens, in nats. (B,) a side
    """
    rows = list(range(len(prompts))) * 2
    both = _stack(completions.by_policy, completions.by_reference)
    by_policy, by_reference = token_logps(model, prompts.select(rows), both).sum(1).chunk(2)
    return Pair(by_policy, by_reference)


def _stack(first: Completions, second: Completions) -> Completions:
    """Put one batch of completions below the other."""
    width = max(first.ids.shape[1], second.ids.shape[1])

    def stacked(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (a, b)])

    return Completions(
        ids=stacked(first.ids, second.ids),
        mask=stacked(first.mask, second.mask),
        ended=torch.cat([first.ended, second.ended]),
        texts=first.texts + second.texts,
        token_logps=stacked(first.token_logps, second.token_logps),
    )
