"""Bradley-Terry training of the tiny reward model on noisy preference labels."""

import itertools
import random
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tools.quickstart_assets.damage import WAYS, damage
from tools.quickstart_assets.fitting import fit
from tools.quickstart_assets.grammar import draw_completion, draw_facts, draw_moods, draw_prompt
from tools.quickstart_assets.judge import is_clean, probability, utility
from tools.quickstart_assets.vocabulary import MAX_LENGTH

GROUP: Final = 6
CLEAN_GROUPS: Final = 2
DAMAGED_GROUPS: Final = 5
SAMPLED_GROUPS: Final = 2
DAMAGED: Final = 0.4
HAPPY: Final = 0.4
CENTERING: Final = 0.02
TIE: Final = 1e-6


@dataclass(frozen=True)
class Group:
    """Completions of one prompt that are compared with one another.

    Attributes:
        prompt: The prompt.
        completions: The completions.
        utilities: Their true utilities.
    """

    prompt: str
    completions: tuple[str, ...]
    utilities: tuple[float, ...]


@dataclass(frozen=True)
class Accuracy:
    """How often the reward model orders a pair rightly.

    Attributes:
        noisy: Against labels drawn from the Bradley-Terry model.
        ceiling: What the true utility reaches against the same labels.
        true: Against the order of the true utilities.
        pairs: How many pairs were compared.
    """

    noisy: float
    ceiling: float
    true: float
    pairs: int


@dataclass(frozen=True)
class Margin:
    """By how much damaged kind stories score lower than intact ones.

    Attributes:
        lost: Share of the damaged stories that score lower.
        low: The margin that 95 % of them exceed.
        mean: The mean margin.
    """

    lost: float
    low: float
    mean: float


def judged(prompt: str, completions: list[str]) -> Group:
    """Makes a group with the true utilities of its completions."""
    return Group(prompt, tuple(completions), tuple(utility(prompt, completion) for completion in completions))


def draw_group(rng: random.Random, held_out: bool, damaged: float) -> Group:
    """Draws a group from the grammar; where completions are damaged, more of the stories are happy ones.

    Args:
        rng: Source of randomness.
        held_out: Whether the prompt is of the validation split.
        damaged: Probability that a completion is damaged.

    Returns:
        The group.
    """
    facts = draw_facts(rng, held_out)
    completions: list[str] = []
    for _ in range(GROUP):
        moods = (1, 1, 1) if damaged and rng.random() < HAPPY else draw_moods(rng)
        text = draw_completion(rng, facts, moods)
        completions.append(damage(rng, facts, text) if rng.random() < damaged else text)
    return judged(draw_prompt(rng, facts), completions)


def new_reward_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    """Makes an untrained reward model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def scores(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Scores whole texts: a prompt with its completion, as one string."""
    # Right padding under a causal mask needs no attention mask; the model looks for the last token before the padding.
    ids = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)["input_ids"]
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits[:, 0]


def preference_loss(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, groups: list[Group], rng: random.Random
) -> torch.Tensor:
    """Returns the Bradley-Terry loss of freshly drawn labels for every pair of every group."""
    texts = [group.prompt + completion for group in groups for completion in group.completions]
    table = scores(model, tokenizer, texts).view(len(groups), GROUP)
    margins = []
    for row, group in zip(table, groups, strict=True):
        for i, k in itertools.combinations(range(GROUP), 2):
            first = rng.random() < probability(group.utilities[i], group.utilities[k])
            margins.append(row[i] - row[k] if first else row[k] - row[i])
    # The loss leaves the level of the scores free: a weak pull keeps that of the clean groups near zero.
    return -functional.logsigmoid(torch.stack(margins)).mean() + CENTERING * table[:CLEAN_GROUPS].mean() ** 2


def train_reward_model(
    tokenizer: PreTrainedTokenizerFast, sampled: list[Group], steps: int, seed: int
) -> LlamaForSequenceClassification:
    """Trains a reward model from nothing.

    Args:
        tokenizer: The reward model's tokenizer.
        sampled: Groups that hold samples of the policy; every batch has two of them.
        steps: Optimizer steps.
        seed: Seed of the weights, groups and labels.

    Returns:
        The reward model, in evaluation mode.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_reward_model(tokenizer)
    shares = [0.0] * CLEAN_GROUPS + [DAMAGED] * DAMAGED_GROUPS

    def draw_loss() -> torch.Tensor:
        groups = [draw_group(rng, held_out=False, damaged=share) for share in shares]
        return preference_loss(model, tokenizer, groups + rng.sample(sampled, SAMPLED_GROUPS), rng)

    fit("reward", model, steps, draw_loss)
    return model


@torch.no_grad()
def measure(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, groups: list[Group], seed: int
) -> Accuracy:
    """Measures pair accuracy on held-out groups; pairs of equal utility are left out."""
    rng = random.Random(seed)
    noisy = ceiling = true = pairs = 0
    for group in groups:
        row = scores(model, tokenizer, [group.prompt + completion for completion in group.completions]).tolist()
        for i, k in itertools.combinations(range(len(row)), 2):
            first, second = group.utilities[i], group.utilities[k]
            if abs(first - second) < TIE:
                continue
            label = rng.random() < probability(first, second)
            pairs += 1
            noisy += (row[i] > row[k]) == label
            ceiling += (first > second) == label
            true += (row[i] > row[k]) == (first > second)
    return Accuracy(noisy / pairs, ceiling / pairs, true / pairs, pairs)


@torch.no_grad()
def margins(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> dict[str, Margin]:
    """Compares intact kind stories with damaged ones about the same held-out prompt, for every kind of damage."""
    rng = random.Random(seed)
    kind = (1, 1, 1)
    found: dict[str, Margin] = {}
    for name, (way, _) in WAYS.items():
        intact, damaged = list[str](), list[str]()
        while len(intact) < count:
            facts = draw_facts(rng, held_out=True)
            prompt = draw_prompt(rng, facts)
            text = way(rng, facts, draw_completion(rng, facts, kind))
            if not is_clean(prompt, text):
                intact.append(prompt + draw_completion(rng, facts, kind))
                damaged.append(prompt + text)
        gaps = sorted((scores(model, tokenizer, intact) - scores(model, tokenizer, damaged)).tolist())
        found[name] = Margin(sum(gap > 0 for gap in gaps) / count, gaps[count // 20], sum(gaps) / count)
    return found
