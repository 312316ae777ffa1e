"""Log-probabilities of completions under a causal language model."""

import torch
from torch import Tensor, nn

from xpo_lightning.adapters import adapters_cast
from xpo_lightning.anatomy import anatomy_of
from xpo_lightning.batch import Completions, Pair, Prompts, stack
from xpo_lightning.forward import is_checkpointing
from xpo_lightning.head import head_logps
from xpo_lightning.prefix import plain_features, shared_features


def token_logps(model: nn.Module, prompts: Prompts, completions: Completions) -> Tensor:
    """Score the tokens of completions, at temperature 1 over the full vocabulary.

    Args:
        model: A transformers causal language model on the device of the prompts. Gradients flow where they are enabled.
        prompts: B prompts.
        completions: B completions of them.

    Returns:
        Natural log-probability of each completion token, in float32; 0 on padding. (B, T)
    """
    head = anatomy_of(model).head
    return logps_of(plain_features(model, prompts, completions, head), completions, head)


def pair_logps(model: nn.Module, prompts: Prompts, completions: Pair[Completions]) -> Pair[Tensor]:
    """Score both completions of each prompt; the prompt is computed once for both where the model allows it.

    Args:
        model: As in `token_logps`.
        prompts: B prompts.
        completions: B completions a side.

    Returns:
        Log-probability of each completion, summed over its tokens, in nats. (B,) a side
    """
    both, anatomy = stack(completions), anatomy_of(model)
    with adapters_cast(model):
        if shares_prompt(model):
            features = shared_features(model, prompts, both, anatomy.head, pads_right=anatomy.pads_right)
        else:
            features = plain_features(model, prompts.select(list(range(len(prompts))) * 2), both, anatomy.head)
    logps = logps_of(features, both, anatomy.head)
    by_policy, by_reference = logps.sum(1).chunk(2)
    return Pair(by_policy, by_reference)


def shares_prompt(model: nn.Module) -> bool:
    """Tell whether `pair_logps` computes each prompt once; gradient checkpointing switches caches off."""
    recomputes = model.training and torch.is_grad_enabled() and is_checkpointing(model)
    return anatomy_of(model).shares_prompt and not recomputes


def logps_of(features: Tensor, completions: Completions, head: nn.Linear | None) -> Tensor:
    """Turn features into the log-probabilities of completion tokens; padding costs nothing.

    Args:
        features: What predicts each token: hidden states (B, T, D) with `head`, or logits (B, T, V).
        completions: B completions.
        head: The vocabulary head that the features lack.

    Returns:
        Natural log-probability of each token, in float32; 0 on padding. (B, T)
    """
    rows, width = completions.ids.shape
    real = torch.arange(width) < torch.tensor(completions.counts)[:, None]
    index = real.flatten().nonzero()[:, 0].to(features.device, non_blocking=True)
    chosen, targets = features.flatten(0, 1)[index], completions.ids.flatten()[index]
    if head is None:
        logps = chosen.float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    else:
        logps = head_logps(chosen, head, targets)
    return logps.new_zeros(rows * width).index_put((index,), logps).view(rows, width)
