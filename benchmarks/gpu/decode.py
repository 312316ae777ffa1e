"""The time of a token of a rollout on a CUDA device: steps as they are, and replayed CUDA graphs."""

import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.assets import DEVICE, SHAPES, random_policy, word_tokenizer
from benchmarks.speed.measuring import finish_device_work
from xpo_lightning import Prompts, Sampling
from xpo_lightning.core.batch import left_pad
from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.rollout.local import LocalRollout

NEW_TOKENS, SHORTEST, LONGEST, REPEATS = 64, 64, 448, 3
DECODED_ROWS = (128, 1, 512, 32)


def decode_cases(names: list[str]) -> Iterator[tuple[str, int]]:
    """List what is measured: for each number of rows each model."""
    return ((name, rows) for rows in DECODED_ROWS for name in names)


@torch.no_grad()
def measure_decoding(name: str, rows: int) -> list[dict[str, Any]]:
    """Sample so many completions with a model of random weights in bfloat16, both ways, three times each.

    Args:
        name: A name of `gpu_assets.SHAPES`.
        rows: Completions together.

    Returns:
        For each way the seconds of the last time, of reading the prompts and of a token; and what share of the tokens
        are those of the first way.
    """
    torch.manual_seed(0)
    model = random_policy(SHAPES[name], torch.bfloat16).eval()
    prompts, measured, expected = _prompts(rows, SHAPES[name].vocabulary), [], None
    for way in ("eager", "graphs"):
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        rollout = LocalRollout(word_tokenizer(1000), sampling, [], replays=way == "graphs")
        uniforms = rollout.uniforms(prompts, RolloutRNG(0))
        for _ in range(REPEATS):
            begun = _now()
            session = rollout.open(model, prompts)
            read = _now()
            written = rollout.sample(session, uniforms)
            done = _now()
        expected = written.ids if expected is None else expected
        measured.append(
            {
                "model": name,
                "rows": rows,
                "way": way,
                "read_seconds": read - begun,
                "token_seconds": (done - read) / NEW_TOKENS,
                "same_tokens": float((written.ids == expected).float().mean()),
                "peak": torch.cuda.max_memory_allocated(),
            }
        )
    return measured


def _prompts(rows: int, vocabulary: int) -> Prompts:
    source = random.Random(0)
    ids = [[source.randrange(3, vocabulary) for _ in range(source.randint(SHORTEST, LONGEST))] for _ in range(rows)]
    padded, mask = left_pad(ids)
    return Prompts(padded.to(DEVICE), mask.to(DEVICE), ("",) * rows)


def _now() -> float:
    finish_device_work()
    return time.perf_counter()
