"""Computes log-probabilities of completions under a causal language model, and next-token entropies."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Pair, Prompts, concat_completions
from xpo_lightning.models.forward.capabilities import Sharing, capabilities_of, refuse_untrainable, rows_of, sharing_of
from xpo_lightning.models.forward.causal_forward import is_checkpointing
from xpo_lightning.models.forward.lm_head import apply_head, head_logps, logps_and_entropies
from xpo_lightning.models.forward.prefix_sharing import shared_features
from xpo_lightning.models.forward.unshared import unshared_features
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.models.sharding import is_sharded


def token_logps(model: nn.Module, prompts: Prompts, completions: Completions) -> Tensor:
    """Score the tokens of completions, at temperature 1 over the full vocabulary.

    Args:
        model: A transformers causal language model on the device of the prompts. Gradients flow where they are enabled.
        prompts: B prompts.
        completions: B completions of them.

    Returns:
        Natural log-probability of each completion token, in float32; 0 on padding. (B, T)
    """
    head = capabilities_of(model).head
    how = rows_of(model, _width(prompts, completions))
    return logps_of(unshared_features(model, prompts, completions, head, how), completions, head)


@torch.no_grad()
def next_logits(model: nn.Module, prompts: Prompts) -> Tensor:
    """Return a judge model's logits of the token after each of B prompts, of shape (B, V)."""
    found, one = capabilities_of(model), prompts.ids[:, -1:]  # any token will do: only its prediction is used
    head, found.key = found.head, "model.reward"
    real = torch.ones_like(one, dtype=torch.bool)
    blank = Completions(one, real, real[:, 0], ("",) * len(one), torch.zeros(one.shape, device=one.device))
    features = unshared_features(model, prompts, blank, head, rows_of(model, _width(prompts, blank)))
    return apply_head(features[:, 0], head)


def several_logps(
    model: nn.Module, prompts: Prompts, completions: Sequence[Completions]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Score several completions of each prompt; encode the prompt once for all if the model supports it.

    Args:
        model: As in `token_logps`.
        prompts: B prompts.
        completions: K times B completions.

    Returns:
        Log-probability of each completion, summed over its tokens, in nats, (B,) each; and the last hidden states that
        predict the completions' tokens, (B, T, D) each, or None if the model gives logits alone.
    """
    together, head = _stacked(model, completions), capabilities_of(model).head
    features = _features_of(model, prompts, together)
    logps = logps_of(features, together, head).sum(1).chunk(len(completions))
    return list(logps), None if head is None else list(features.chunk(len(completions)))


def pair_logps(model: nn.Module, prompts: Prompts, completions: Pair[Completions]) -> Pair[Tensor]:
    """Score both completions of each prompt; see `several_logps`."""
    return Pair(*several_logps(model, prompts, [completions.by_policy, completions.by_sampler])[0])


def several_logps_and_entropies(
    model: nn.Module, prompts: Prompts, completions: Sequence[Completions]
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
    """Score several completions of each prompt, and measure the policy's entropy along the first.

    Args:
        model: As in `token_logps`.
        prompts: B prompts.
        completions: K times B completions.

    Returns:
        What `several_logps` returns, and the entropy of the next-token distribution (full vocabulary, temperature 1,
        in nats), averaged over the tokens of the first completion. (B,)
    """
    together, head = _stacked(model, completions), capabilities_of(model).head
    features = _features_of(model, prompts, together).chunk(len(completions))
    own = completions[0]
    index, chosen, targets = _real(features[0][:, : own.ids.shape[1]], own)
    logps, entropies = (_padded(values, index, own) for values in logps_and_entropies(chosen, head, targets))
    means = entropies.sum(1) / own.lengths.clamp(min=1)
    others = [
        logps_of(of_some[:, : some.ids.shape[1]], some, head).sum(1)
        for of_some, some in zip(features[1:], completions[1:], strict=True)
    ]
    return [logps.sum(1), *others], None if head is None else list(features), means


def pair_logps_and_entropies(
    model: nn.Module, prompts: Prompts, completions: Pair[Completions]
) -> tuple[Pair[Tensor], Tensor]:
    """Score both completions, and measure the entropy along the policy's; see `several_logps_and_entropies`."""
    both = [completions.by_policy, completions.by_sampler]
    logps, _, entropies = several_logps_and_entropies(model, prompts, both)
    return Pair(*logps), entropies


def shares_prompt(model: nn.Module, length: int) -> Sharing:
    """Return how `pair_logps` shares a prompt between its completions.

    Gradient checkpointing switches caches off, so it rules sharing out.

    Args:
        model: As in `token_logps`.
        length: Tokens of the longest row, prompt and completion.
    """
    recomputes = model.training and torch.is_grad_enabled() and is_checkpointing(model)
    return Sharing.NOT if recomputes else sharing_of(model, length)


def logps_of(features: Tensor, completions: Completions, head: nn.Linear | None) -> Tensor:
    """Turn features into the log-probabilities of completion tokens; computes nothing for padding.

    Args:
        features: Features that predict each token: hidden states (B, T, D) with `head`, or logits (B, T, V).
        completions: B completions.
        head: The vocabulary head to apply to hidden states; None if the features are logits.

    Returns:
        Natural log-probability of each token, in float32; 0 on padding. (B, T)
    """
    index, chosen, targets = _real(features, completions)
    if head is None:
        logps = chosen.float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    else:
        logps = head_logps(chosen, head, targets)
    return _padded(logps, index, completions)


def _stacked(model: nn.Module, completions: Sequence[Completions]) -> Completions:
    """Stack the completions of each prompt, the policy's first.

    Each pass over sharded layers gathers their weights, so all ranks must run equally many passes. The pass over the
    prompt alone predicts completions of one token, so these are padded to need the second pass too.
    """
    return concat_completions(completions, width=2 if is_sharded(model) else 1)


def _features_of(model: nn.Module, prompts: Prompts, stacked: Completions) -> Tensor:
    """Return features that predict each token of K stacked completions a prompt: (K * B, T, D) or logits (.., V)."""
    head, length = capabilities_of(model).head, _width(prompts, stacked)
    with cast_lora_weights(model):
        if model.training:
            refuse_untrainable(model)
        sharing = shares_prompt(model, length)
        if sharing is not Sharing.NOT:
            return shared_features(model, prompts, stacked, head, pads_right=sharing is Sharing.PADDED_RIGHT)
        repeated = prompts.select(list(range(len(prompts))) * (len(stacked) // len(prompts)))
        return unshared_features(model, repeated, stacked, head, rows_of(model, length))


def _width(prompts: Prompts, completions: Completions) -> int:
    return prompts.ids.shape[1] + completions.ids.shape[1]


def _real(features: Tensor, completions: Completions) -> tuple[Tensor, Tensor, Tensor]:
    """Select the N real tokens of (B, T): their flat indices (N,), features (N, F) and ids (N,)."""
    real = torch.arange(completions.ids.shape[1]) < torch.tensor(completions.counts)[:, None]
    index = real.flatten().nonzero()[:, 0].to(features.device, non_blocking=True)
    return index, features.flatten(0, 1)[index], completions.ids.flatten()[index]


def _padded(values: Tensor, index: Tensor, completions: Completions) -> Tensor:
    """Scatter one number per real token back to shape (B, T); 0 on padding."""
    rows, width = completions.ids.shape
    return values.new_zeros(rows * width).index_put((index,), values).view(rows, width)
