"""Supervised training of the tiny policy on stories drawn from the grammar, and sampling from it."""

import random
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.quickstart_assets.fitting import fit
from tools.quickstart_assets.grammar import draw_story
from tools.quickstart_assets.vocabulary import MAX_LENGTH

BATCH: Final = 32
IGNORED: Final = -100
NEW_TOKENS: Final = 64
SHARPNESS: Final = 1.25


def new_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Makes an untrained policy."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    policy = LlamaForCausalLM(config)
    policy.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return policy


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts and completions, with EOS at the end; labels cover the completions only.

    Args:
        tokenizer: The policy's tokenizer.
        stories: Pairs of a prompt and a completion.

    Returns:
        Token ids, padded on the right, and labels.
    """
    prompts = tokenizer([prompt for prompt, _ in stories])["input_ids"]
    rests = tokenizer([completion for _, completion in stories])["input_ids"]
    rows = [torch.tensor([*a, *b, tokenizer.eos_token_id]) for a, b in zip(prompts, rests, strict=True)]
    marks = [
        torch.tensor([IGNORED] * len(a) + [*b, tokenizer.eos_token_id]) for a, b in zip(prompts, rests, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, float(tokenizer.pad_token_id)), pad(marks, True, IGNORED)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of fresh stories for ever, each of stories of a similar length."""
    rng = random.Random(seed)
    while True:
        pool = sorted((draw_story(rng) for _ in range(BATCH * 8)), key=lambda story: len(story[0]) + len(story[1]))
        chunks = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield encode(tokenizer, chunk)


def completion_loss(policy: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy of the completions' tokens."""
    # Right padding under a causal mask needs no attention mask; only labelled positions pay for logits.
    hidden = policy.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return functional.cross_entropy(policy.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def train_policy(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    """Trains a policy from nothing.

    Args:
        tokenizer: The policy's tokenizer.
        steps: Optimizer steps.
        seed: Seed of the weights and of the stories.

    Returns:
        The policy, in evaluation mode.
    """
    torch.manual_seed(seed)
    policy = new_policy(tokenizer)
    drawn = batches(tokenizer, seed)
    fit("policy", policy, steps, lambda: completion_loss(policy, *next(drawn)))
    return policy


@torch.no_grad()
def sharpen(policy: LlamaForCausalLM) -> None:
    """Scales the logits up, through the weight of the last norm.

    Choices of the grammar that are equally likely stay so; words that do not belong become rarer.
    """
    policy.model.norm.weight.mul_(SHARPNESS)


@torch.no_grad()
def held_out_loss(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Returns the loss per token on completions of validation prompts."""
    rng = random.Random(seed)
    stories = [draw_story(rng, held_out=True) for _ in range(512)]
    return completion_loss(policy, *encode(tokenizer, stories)).item()


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float = 1.0
) -> tuple[list[str], list[bool]]:
    """Samples one completion for each prompt from the whole distribution.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer, which pads on the left.
        prompts: Prompts.
        temperature: Sampling temperature.

    Returns:
        The completions, and for each whether it ended with EOS in time.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = cast(Any, policy).generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True), (new == tokenizer.eos_token_id).any(1).tolist()
