"""The problems: reference policies and rewards, as a model folder, a table of rewards, and prompts for each."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tabular import TabularConfig, TabularLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

STEPS_AN_EPOCH = 50
"""Batches of a pass over the prompts, which are all alike; each pass costs Lightning some time."""


@dataclass(frozen=True)
class Problem:
    """A reference policy, rewards, and how long to train.

    Args:
        name: Its name, and that of its folder.
        beta: Strength of the KL constraint.
        pairs: Pairs a seed in each batch; each pair costs one label.
        labels: Labels a seed of a whole run.
        reference: Probability of each action after each text of fewer than `length` actions. (nodes, actions), float64
        rewards: From a number of seeds, the reward of each completion, in the order of `completions`. (seeds, A^H)
        rare: The first actions of a completion that counts as a find.
        length: Actions of a completion, H.
    """

    name: str
    beta: float
    pairs: int
    labels: int
    reference: Tensor
    rewards: Callable[[int], Tensor]
    rare: tuple[int, ...]
    length: int = 1

    @property
    def actions(self) -> int:
        """Size of the action set, A."""
        return self.reference.shape[1]

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.labels // self.pairs


def completions(actions: int, length: int) -> list[tuple[int, ...]]:
    """List all completions, the last action changing fastest."""
    texts: list[tuple[int, ...]] = [()]
    for _ in range(length):
        texts = [(*text, action) for text in texts for action in range(actions)]
    return texts


def two_arms(name: str, beta: float, rare: float, pairs: int, labels: int) -> Problem:
    """Build Proposition 2.1's problem: r(a) = 1, r(b) = 1/2 (arXiv 2405.21046, Appendix D.1)."""
    reference = torch.tensor([[rare, 1 - rare]], dtype=torch.float64)
    return Problem(name, beta, pairs, labels, reference, lambda seeds: torch.tensor([[1.0, 0.5]] * seeds), (0,))


def rare_best(labels: int) -> Problem:
    """Build a problem of 32 tokens of which the least likely is the best; the other rewards are drawn for each seed."""
    reference = (-torch.linspace(0, 8.5, 32, dtype=torch.float64)).softmax(0)[None]

    def rewards(seeds: int) -> Tensor:
        drawn = torch.rand(seeds, 32, generator=torch.Generator().manual_seed(2405))
        drawn[:, 31] = 2.0
        return drawn

    return Problem("rare_best", 0.1, 8, labels, reference, rewards, (31,))


def blind(tokens: int, labels: int) -> Problem:
    """Build a problem with much to explore in vain: 8 common tokens (r 1), a best (1e-4, r 3), garbage (1e-5, r 0)."""
    garbage = tokens - 9
    common = (1 - 1e-4 - 1e-5 * garbage) / 8
    reference = torch.tensor([[*[common] * 8, *[1e-5] * garbage, 1e-4]], dtype=torch.float64)
    values = torch.tensor([*[1.0] * 8, *[0.0] * garbage, 3.0])
    return Problem(f"blind_{tokens}", 0.1, 8, labels, reference, lambda seeds: values.repeat(seeds, 1), (tokens - 1,))


def rare_mode(name: str, rare: float, labels: int) -> Problem:
    """Build a problem of 4 tokens out of 4: a rare first token, after which three right ones are worth much more."""
    reference = torch.full((85, 4), 0.25, dtype=torch.float64)
    reference[0] = torch.tensor([rare, *[(1 - rare) / 3] * 3], dtype=torch.float64)
    values = torch.empty(256)
    for place, (first, *others) in enumerate(completions(4, 4)):
        right = sum(action == wanted for action, wanted in zip(others, (1, 2, 3), strict=True)) / 3
        values[place] = 1 + 2 * right if first == 0 else 0.5 * right
    return Problem(name, 0.1, 8, labels, reference, lambda seeds: values.repeat(seeds, 1), (0,), 4)


def lock(labels: int) -> Problem:
    """Build a combination lock: 4 tokens out of 3, of which one is right, with probability 0.05; r 2 for all four."""
    reference = torch.tensor([[0.05, 0.475, 0.475]], dtype=torch.float64).repeat(40, 1)
    values = torch.zeros(81)
    values[0] = 2.0
    return Problem("lock", 0.1, 8, labels, reference, lambda seeds: values.repeat(seeds, 1), (0, 0, 0, 0), 4)


def proposition(beta: float, labels: int) -> Problem:
    """Build Proposition 2.1's problem at its own rarity, exp(-1 / (8 beta))."""
    return two_arms(f"beta_{beta}", beta, math.exp(-1 / (8 * beta)), 4, labels)


PROBLEMS = {
    problem.name: problem
    for problem in (
        proposition(0.02, 4_000),
        proposition(0.015, 12_000),
        proposition(0.0125, 11_200),
        rare_best(8_000),
        blind(32, 8_000),
        blind(256, 8_000),
        rare_mode("rare_mode", 1e-4, 6_000),
        rare_mode("less_rare_mode", 1e-3, 6_000),
        two_arms("good_coverage", 0.1, 0.3, 8, 4_000),
        lock(9_600),
    )
}


def write(problem: Problem, folder: Path, seeds: int) -> Path:
    """Write what a run needs.

    Args:
        problem: The problem.
        folder: Where the folder of that name goes.
        seeds: Independent repetitions.

    Returns:
        The problem's config, for `xpo fit --config`.
    """
    place = folder.absolute() / problem.name
    place.mkdir(parents=True, exist_ok=True)
    model = TabularLM(TabularConfig(problem.actions, problem.length, seeds))
    with torch.no_grad():
        model.logits.copy_(problem.reference.log().expand_as(model.logits))
    model.save_pretrained(place)
    _tokenizer(problem.actions, seeds).save_pretrained(place)
    prompts = [json.dumps({"prompt": f"seed{seed}"}) + "\n" for seed in range(seeds)]
    (place / "prompts.jsonl").write_text("".join(prompts * (problem.pairs * min(STEPS_AN_EPOCH, problem.steps))))
    facts = {
        "beta": problem.beta,
        "pairs": problem.pairs,
        "rare": " ".join(map(word, problem.rare)),
        "rewards": problem.rewards(seeds).tolist(),
    }
    (place / "problem.json").write_text(json.dumps(facts))
    config = {
        "model": {
            "policy": {"path": str(place)},
            "reward": {"init_args": {"arguments": {"problem": str(place)}}},
            "sampling": {"max_new_tokens": problem.length},
            "beta": problem.beta,
        },
        "data": {"source": str(place / "prompts.jsonl"), "batch_size": seeds * problem.pairs},
        "trainer": {"max_steps": problem.steps},
    }
    path = place / "problem.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def word(action: int) -> str:
    """Name an action as a token."""
    return f"a{action}"


def _tokenizer(actions: int, seeds: int) -> PreTrainedTokenizerFast:
    words = [*map(word, range(actions)), *(f"seed{seed}" for seed in range(seeds))]
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(words)}, unk_token="a0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
