"""Reads the prompts before a run: their number and lengths, and whether they fit into the reward models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer

from xpo_lightning.core.errors import InputError
from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.dataloader import PromptStream
from xpo_lightning.data.preprocessing import PromptPreprocessor, Sample
from xpo_lightning.rewards import SequenceClassifierReward
from xpo_lightning.rewards.sequence_classifier.inputs import render

MOST_OF_A_STREAM = 1000
"""Most prompts that are read of a stream, which may have no end."""


@dataclass(frozen=True)
class Prompts:
    """Prompts that were read.

    Args:
        samples: Some of the prompts for a dry step: the longest, then others spread evenly.
        lengths: Tokens of each prompt, in ascending order.
        truncated: Number of prompts that were too long and lost their beginning.
        is_stream: Whether these are only the first prompts of a stream.
    """

    samples: list[Sample]
    lengths: list[int]
    truncated: int
    is_stream: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.lengths[-1]

    @property
    def mean(self) -> float:
        """Average number of tokens of a prompt."""
        return sum(self.lengths) / len(self.lengths)

    def percentile(self, share: float) -> int:
        """Return the smallest length in tokens that this share of the prompts does not exceed."""
        return self.lengths[max(0, math.ceil(share * len(self.lengths)) - 1)]


@dataclass(frozen=True)
class Survey:
    """The data of a run.

    Args:
        training: The training prompts.
        validation: The validation prompts; None if there are none.
        batches: Training batches of an epoch on each device; infinite if unknown.
    """

    training: Prompts
    validation: Prompts | None
    batches: float


def survey(trainer: Trainer, data: PromptDataModule, wanted: int) -> Survey:
    """Read all prompts, or the first ones of a stream.

    Args:
        trainer: The trainer, with its data loaders set up.
        data: The data module, set up.
        wanted: Training prompts to keep for a closer look.

    Raises:
        InputError: A row of a stream cannot be used.
    """
    training = _read(data.train_dataloader().dataset, data.encoding, wanted)
    held_out = data.val_dataloader()
    validation = None if isinstance(held_out, list) else _read(held_out.dataset, data.encoding, 0)
    return Survey(training, validation, trainer.num_training_batches)


def _read(dataset: Any, encoding: PromptPreprocessor, wanted: int) -> Prompts:
    is_stream = isinstance(dataset, PromptStream)
    # The first rows of a stream are kept in memory, because it can be read only once, in its own order.
    rows: Sequence[Sample] = list(islice(dataset, MOST_OF_A_STREAM)) if is_stream else dataset
    lengths: list[int] = []
    truncated = 0
    for sample in (rows[place] for place in range(len(rows))):
        lengths.append(len(sample["prompt_ids"]))
        truncated += _was_cut(sample, encoding)
    chosen = [rows[place] for place in pick_evenly(lengths, wanted)]
    return Prompts(chosen, sorted(lengths), truncated, is_stream)


def pick_evenly(lengths: Sequence[int], wanted: int) -> list[int]:
    """Return indices without repeats: that of the longest prompt, then others at even distances."""
    if not wanted:
        return []
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    others = [place for place in range(len(lengths)) if place != longest]
    count = min(wanted - 1, len(others))
    return [longest, *(others[number * len(others) // count] for number in range(count))]


def _was_cut(sample: Sample, encoding: PromptPreprocessor) -> bool:
    """Tell whether a prompt was cut to the longest length that prompts may have."""
    if encoding.truncate != "left" or encoding.encoder is None or len(sample["prompt_ids"]) != encoding.max_tokens:
        return False
    return len(encoding.encoder(sample["prompt"])) > len(sample["prompt_ids"])


@dataclass(frozen=True)
class RewardRows:
    """How many prompts leave room for a completion in a reward model's input.

    Args:
        read: Number of prompts that were checked.
        too_long: Number of prompts that leave no room for a completion of `model.sampling.max_new_tokens`.
        limit: Most tokens that the reward model takes; None for no limit.
    """

    read: int
    too_long: int
    limit: int | None


def reward_rows(reward: SequenceClassifierReward, samples: Sequence[Sample], new_tokens: int) -> RewardRows:
    """Count the prompts that leave a reward model too few tokens for a completion.

    Args:
        reward: A loaded reward model.
        samples: B prompts.
        new_tokens: Most tokens of a completion, as the policy counts; the reward model's tokenizer may differ.

    Raises:
        InputError: The chat template refuses a prompt, or a prompt alone is too long and must not be cut.
    """
    encoder = reward.encoder
    if encoder is None or encoder.max_tokens is None:
        return RewardRows(len(samples), 0, None)
    texts = [render(sample["prompt"], "", encoder.tokenizer, reward.prompt_format) for sample in samples]
    lengths = [
        len(encoder.tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"])
        for text, is_chat in texts
    ]
    if reward.truncate == "error" and lengths and max(lengths) >= encoder.max_tokens:
        raise InputError(
            f"model.reward.init_args.truncate is error, but a prompt has {max(lengths)} tokens alone, and the reward "
            f"model takes {encoder.max_tokens}; set it to left or right, or lower data.max_prompt_tokens"
        )
    too_long = sum(length + new_tokens > encoder.max_tokens for length in lengths)
    return RewardRows(len(samples), too_long, encoder.max_tokens)
