"""Builds the embedded assets from nothing: ``python -m tools.quickstart_assets.build [--out DIR]``."""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tools.quickstart_assets.card import Measured, bytes_below, write_card
from tools.quickstart_assets.grammar import draw_completion, draw_moods, draw_prompts, draw_story, read_facts
from tools.quickstart_assets.judge import is_clean
from tools.quickstart_assets.pairs import PAIRS, write_pairs
from tools.quickstart_assets.policy_training import SHARPNESS, held_out_loss, sample, sharpen, train_policy
from tools.quickstart_assets.reward_training import (
    Accuracy,
    Group,
    draw_group,
    judged,
    margins,
    measure,
    scores,
    train_reward_model,
)
from tools.quickstart_assets.vocabulary import make_tokenizer

SEED: Final = 20240
PROMPTS: Final = 1600
VALIDATION_PROMPTS: Final = 256
TOKENIZER_STORIES: Final = 20_000
SAMPLED_GROUPS: Final = 384
MEASURED_GROUPS: Final = 256
MEASURED_MARGINS: Final = 64


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="ascii")


def sampled_groups(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], rng: random.Random
) -> list[Group]:
    """Makes groups of four samples of the policy, one of them hot, and two grammar completions."""
    drawn = [sample(policy, tokenizer, prompts, temperature)[0] for temperature in (1.0, 1.0, 1.0, 1.4)]
    drawn += [[draw_completion(rng, read_facts(prompt), draw_moods(rng)) for prompt in prompts] for _ in range(2)]
    return [judged(prompt, list(texts)) for prompt, *texts in zip(prompts, *drawn, strict=True)]


def build_policy(out: Path, tokenizer: PreTrainedTokenizerFast, steps: int) -> tuple[LlamaForCausalLM, dict[str, str]]:
    """Trains, sharpens and saves the policy.

    Args:
        out: Directory of the assets.
        tokenizer: The policy's tokenizer.
        steps: Optimizer steps.

    Returns:
        The policy and what the card says of it.
    """
    policy = train_policy(tokenizer, steps, SEED)
    loss = held_out_loss(policy, tokenizer, SEED + 1)
    sharpen(policy)
    policy.save_pretrained(out / "policy")
    tokenizer.save_pretrained(out / "policy")
    return policy, {
        "policy_steps": str(steps),
        "sharpness": str(SHARPNESS),
        "policy_parameters": str(policy.num_parameters()),
        "loss": f"{loss:.3f}",
        "perplexity": f"{math.exp(loss):.2f}",
    }


def describe_samples(
    prompts: list[str], completions: list[str], ended: list[bool], found: list[float]
) -> dict[str, str]:
    """Returns what the card says of samples of the policy and of their scores."""
    group = [judged(prompt, [completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    utilities = [one.utilities[0] for one in group]
    clean = [is_clean(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return {
        "samples": str(len(prompts)),
        "ended": f"{100 * statistics.mean(ended):.1f}",
        "clean": f"{100 * statistics.mean(clean):.1f}",
        "distinct": str(len(set(completions))),
        "mean_utility": f"{statistics.mean(utilities):.2f}",
        "sd_utility": f"{statistics.pstdev(utilities):.2f}",
        "mean_score": f"{statistics.mean(found):.2f}",
        "sd_score": f"{statistics.pstdev(found):.2f}",
        "min_score": f"{min(found):.2f}",
        "max_score": f"{max(found):.2f}",
        "correlation": f"{statistics.correlation(found, utilities):.3f}",
    }


def held_out_accuracy(
    policy: LlamaForCausalLM,
    policy_tokenizer: PreTrainedTokenizerFast,
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
) -> dict[str, Accuracy]:
    """Measures the reward model on grammar completions, on samples of the policy and on damaged completions."""
    rng = random.Random(SEED + 2)
    drawn = [sample(policy, policy_tokenizer, prompts)[0] for _ in range(2)]
    groups = {
        "clean": [draw_group(rng, held_out=True, damaged=0.0) for _ in range(MEASURED_GROUPS)],
        "policy": [judged(prompt, list(pair)) for prompt, *pair in zip(prompts, *drawn, strict=True)],
        "damaged": [draw_group(rng, held_out=True, damaged=0.25) for _ in range(MEASURED_GROUPS)],
    }
    return {name: measure(reward, tokenizer, some, SEED + 3) for name, some in groups.items()}


def build(out: Path, policy_steps: int, reward_steps: int) -> None:
    """Builds all assets and the card.

    Args:
        out: Directory to write to.
        policy_steps: Optimizer steps of the policy.
        reward_steps: Optimizer steps of the reward model.
    """
    rng = random.Random(SEED)
    prompts = draw_prompts(rng, PROMPTS, held_out=False)
    validation = draw_prompts(rng, VALIDATION_PROMPTS, held_out=True)
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out / "prompts.jsonl", prompts)
    write_prompts(out / "prompts_validation.jsonl", validation)
    write_pairs(out)
    texts = [text for _ in range(TOKENIZER_STORIES) for text in draw_story(rng)]
    left, right = make_tokenizer(texts, "left"), make_tokenizer(texts, "right")

    policy, plain = build_policy(out, left, policy_steps)
    torch.manual_seed(SEED)
    groups = sampled_groups(policy, left, prompts[:SAMPLED_GROUPS], rng)
    reward = train_reward_model(right, groups, reward_steps, SEED)
    reward.save_pretrained(out / "reward")
    right.save_pretrained(out / "reward")

    torch.manual_seed(SEED)
    completions, ended = sample(policy, left, validation)
    texts = [prompt + completion for prompt, completion in zip(validation, completions, strict=True)]
    with torch.no_grad():
        found = scores(reward, right, texts).tolist()
    plain |= describe_samples(validation, completions, ended, found) | {
        "reward_steps": str(reward_steps),
        "reward_parameters": str(reward.num_parameters()),
        "vocabulary": str(len(left)),
        "prompts": str(len(prompts)),
        "validation": str(len(validation)),
        "pairs": str(PAIRS),
    }
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
    rows = held_out_accuracy(policy, left, reward, right, validation)
    lost = margins(reward, right, MEASURED_MARGINS, SEED + 4)
    print(plain, rows, lost, sep="\n")
    write_card(out, Measured(plain, rows, lost, list(zip(validation, completions, strict=True))[:3]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the build from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write to")
    parser.add_argument("--policy-steps", type=int, default=1800)
    parser.add_argument("--reward-steps", type=int, default=600)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    build(options.out, options.policy_steps, options.reward_steps)
    print(f"{bytes_below(options.out)} bytes in {options.out}, built in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
