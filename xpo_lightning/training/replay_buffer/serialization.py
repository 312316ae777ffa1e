"""Converts labelled pairs to lines of JSON, and back."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import BonusSample, Completions, Experience, Pair, Prompts, left_pad, stack_completions
from xpo_lightning.core.errors import InputError


def encoded(experience: Experience) -> list[str]:
    """Encode each of B pairs as a line of JSON with all that an update needs, and its digest.

    The prompts' columns and the writing models' log-probabilities are left out; only the reward and the metrics use
    them. `decoded` returns the numbers bit for bit.
    """
    prompts = experience.prompts
    silent = experience.without_preference.tolist()
    third = [] if experience.sample is None else [experience.sample.reference_logps]
    logps = [experience.reference_logps.by_policy, experience.reference_logps.by_sampler, *third]
    numbers = {
        "scores": [side.tolist() for side in (experience.scores.by_policy, experience.scores.by_sampler)],
        "logps": [side.tolist() for side in logps],
    }
    prompt_ids = _ids(prompts.ids, prompts.mask)
    sides = experience.written
    ids, ended = [_ids(side.ids, side.mask) for side in sides], [side.ended.tolist() for side in sides]
    if experience.previous_logps is not None:
        numbers["previous"] = [side.tolist() for side in vars(experience.previous_logps).values()]
    offline = [False] * len(experience) if experience.offline is None else experience.offline.tolist()
    lines = []
    for row, label in enumerate(experience.labels.tolist()):
        pair = {
            "prompt": prompts.raw[row],
            "prompt_ids": prompt_ids[row],
            "ids": [side[row] for side in ids],
            "texts": [side.texts[row] for side in sides],
            "ended": [side[row] for side in ended],
            "label": label,
            "silent": silent[row],
            **{name: [side[row] for side in values] for name, values in numbers.items()},
            **({"offline": True} if offline[row] else {}),
        }
        text = json.dumps(pair, ensure_ascii=False)
        lines.append(f"{text}\n{_digest(text)}")
    return lines


def decoded(lines: Sequence[str], device: torch.device | str) -> Experience:
    """Decode pairs.

    Args:
        lines: B lines, as `encoded` returns them.
        device: Device of the pairs.

    Returns:
        B pairs; the writing models' log-probabilities of their own tokens are NaN.

    Raises:
        InputError: A line is damaged.
    """
    pairs = [_pair(line) for line in lines]
    offline = [pair.get("offline", False) for pair in pairs]
    ids, mask = left_pad([pair["prompt_ids"] for pair in pairs])

    def of_side(name: str, side: int) -> Tensor:
        return torch.tensor([pair[name][side] for pair in pairs])

    def both(name: str) -> Pair[Tensor]:
        return Pair(of_side(name, 0), of_side(name, 1))

    def completions(side: int) -> Completions:
        ids, ended, texts = ([pair[name][side] for pair in pairs] for name in ("ids", "ended", "texts"))
        return stack_completions(ids, ended, texts)

    return Experience(
        prompts=Prompts(ids, mask, tuple(pair["prompt"] for pair in pairs)),
        completions=Pair(completions(0), completions(1)),
        scores=both("scores"),
        labels=torch.tensor([pair["label"] for pair in pairs]),
        reference_logps=both("logps"),
        silent=torch.tensor([pair["silent"] for pair in pairs]),
        sample=BonusSample(completions(2), of_side("logps", 2)) if len(pairs[0]["ids"]) > 2 else None,
        previous_logps=both("previous") if "previous" in pairs[0] else None,
        offline=torch.tensor(offline) if any(offline) else None,
    ).to(device)


def _pair(line: str) -> Any:
    text, _, digest = line.rpartition("\n")
    if digest != _digest(text):
        raise InputError("model.buffer: a pair of the buffer's file is damaged; resume from an earlier checkpoint")
    return json.loads(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]
