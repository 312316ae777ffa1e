"""One XPO step in which little can go wrong: each row alone, unpadded, without a cache, in a loop."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from xpo_lightning import Completions, Experience, Pair

Row = tuple[list[int], list[int]]
"""The token ids of a prompt and of a completion."""


@dataclass
class NaiveStep:
    """What one step on some pairs comes to.

    Args:
        policy: The policy's log-probability of each token of each completion, one tensor a pair and side.
        reference: The reference's.
        gradients: The gradient of the mean objective, by the name of the weight.
        preference: The mean preference loss.
    """

    policy: Pair[list[Tensor]]
    reference: Pair[list[Tensor]]
    gradients: dict[str, Tensor]
    preference: float


def rows_of(experience: Experience) -> Pair[list[Row]]:
    """Cut the padding off."""
    prompts = [ids[mask].tolist() for ids, mask in zip(experience.prompts.ids, experience.prompts.mask, strict=True)]

    def cut(side: Completions) -> list[Row]:
        written = [ids[mask].tolist() for ids, mask in zip(side.ids, side.mask, strict=True)]
        return list(zip(prompts, written, strict=True))

    return experience.completions.map(cut)


def logits_of(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Run one row, (L, V)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return model(input_ids=torch.tensor([list(ids)]), **options).logits[0].float()


def token_logps(model: nn.Module, row: Row) -> Tensor:
    """Score each token of a completion, (T,)."""
    prompt, completion = row
    logps = logits_of(model, [*prompt, *completion]).log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


def take_step(policy: nn.Module, reference: nn.Module, pairs: Experience, alpha: float, beta: float) -> NaiveStep:
    """Evaluate the objective of labelled pairs and its gradient (arXiv 2405.21046, Algorithm 1, step 6)."""
    rows, scored = rows_of(pairs), Pair[list[Tensor]]([], [])
    with torch.no_grad():
        fixed = rows.map(lambda side: [token_logps(reference, row) for row in side])
    preferences = []
    for pair, label in enumerate(pairs.labels.tolist()):
        own, other = token_logps(policy, rows.by_policy[pair]), token_logps(policy, rows.by_sampler[pair])
        own_ratio, other_ratio = own.sum() - fixed.by_policy[pair].sum(), other.sum() - fixed.by_sampler[pair].sum()
        margin = beta * (own_ratio - other_ratio)
        preference = -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin)
        preference = preference * float(not pairs.without_preference[pair])
        ((preference + alpha * other.sum()) / len(pairs)).backward()
        preferences.append(preference.item())
        scored.by_policy.append(own.detach())
        scored.by_sampler.append(other.detach())
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return NaiveStep(scored, fixed, gradients, sum(preferences) / len(preferences))


@torch.no_grad()
def count_not_greedy(model: nn.Module, rows: Sequence[Row], margin: float = 1e-3) -> int:
    """Count the tokens that are not the likeliest after those before them, read alone; within `margin` is a tie."""
    wrong = 0
    for prompt, completion in rows:
        for place, token in enumerate(completion):
            logits = logits_of(model, [*prompt, *completion[:place]])[-1]
            wrong += bool(logits[token] < logits.max() - margin)
    return wrong
