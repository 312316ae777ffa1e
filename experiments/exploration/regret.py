"""Rewards looked up, regret by enumeration, and which seeds have seen what is rare."""

import csv
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tabular
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from xpo_lightning.callbacks.base import run_folder


def facts(problem: str) -> dict[str, Any]:
    """Read what `problems.write` wrote of a problem, and name each completion."""
    return _facts(problem, (Path(problem) / "problem.json").stat().st_mtime_ns)


@functools.cache
def _facts(problem: str, _written: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(problem) / "problem.json").read_text())
    size = tabular.TabularConfig.from_pretrained(problem)
    texts = [""]
    for _ in range(size.length):
        texts = [f"{text} a{action}".strip() for text in texts for action in range(size.actions)]
    found["places"] = {text: place for place, text in enumerate(texts)}
    return found


def reward(
    prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list[Any]], problem: str
) -> list[float]:
    """Look up the reward of each completion for the seed that its prompt names.

    A completion begins with the space that its first word follows the prompt with.
    """
    known = facts(problem)
    rewards, places = known["rewards"], known["places"]
    return [
        rewards[seed_of(prompt)][places[completion.strip()]]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def seed_of(prompt: str) -> int:
    """Read which seed a prompt names."""
    return int(prompt.removeprefix("seed"))


def best_value(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return max J_beta = beta log sum_y ref(y) exp(r(y) / beta), of shape (seeds,); arguments as for `value`."""
    return beta * torch.logsumexp(_of_texts(reference) + rewards / beta, 1)


def value(policy: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return J_beta = E_pi[r - beta log(pi / ref)], by enumeration of all completions.

    Args:
        policy: Log-probability of each action after each text, float64. (seeds, nodes, actions)
        reference: The reference's. (seeds, nodes, actions)
        rewards: Of each completion, the last action changing fastest. (seeds, A^H)
        beta: Strength of the KL constraint.

    Returns:
        One value a seed. (seeds,)
    """
    logps = _of_texts(policy)
    return (logps.exp() * (rewards - beta * (logps - _of_texts(reference)))).sum(1)


def _of_texts(logps: Tensor) -> Tensor:
    """Add up log-probabilities (seeds, nodes, actions) along each completion, (seeds, A^H)."""
    seeds, nodes, actions = logps.shape
    texts, first, width = logps.new_zeros(seeds, 1), 0, 1
    while first < nodes:  # The nodes of a length stand together, in the order of their texts.
        level = logps[:, first : first + width]
        texts = (texts[:, :, None] + level).flatten(1)
        first, width = first + width, width * actions
    return texts


class Regret(Callback):
    """Logs the exact regret, and keeps that of each seed in `regret.csv`, with what was seen when in `found.csv`.

    `regret.csv` has a row for each measurement: labels a seed so far, and the regret of each seed. `found.csv` has, for
    each seed, the labels at the first pair with a rare completion in it; nothing if there was none. The former is
    written last, at the end of a run, so that a run that has it is complete.

    Args:
        points: How often to measure in a run, evenly spread over its steps, and before the first.
    """

    def __init__(self, points: int = 400) -> None:
        self.points = points

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the reference, and begin to watch the completions."""
        module: Any = pl_module
        self.folder = run_folder(trainer)
        self.known = facts(str(module.policy_spec.path))
        self.reference = _logps(module)
        self.rewards = torch.tensor(self.known["rewards"], dtype=torch.float64)
        self.best = best_value(self.reference, self.rewards, self.known["beta"])
        self.every = max(1, trainer.max_steps // self.points)
        self.batches = 0
        self.first: list[int | None] = [None] * len(self.rewards)
        self.rows: list[list[float]] = [[0, *self._measure(module).tolist()]]
        module.reward.register_forward_hook(self._see)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure now and then."""
        self.batches += 1
        if self.batches % self.every:
            return
        regret = self._measure(pl_module)
        self.rows.append([self.batches * self.known["pairs"], *regret.tolist()])
        if trainer.barebones:
            return
        found = [first is not None for first in self.first]
        pl_module.log_dict(
            {
                "regret/mean": float(regret.mean()),
                "regret/standard_error": standard_error(regret),
                "found": sum(found) / len(found),
            }
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of a run that came to its end."""
        seeds = [f"seed{seed}" for seed in range(len(self.first))]
        found = zip(seeds, ["" if first is None else first for first in self.first], strict=True)
        _write(self.folder / "found.csv", ["seed", "labels"], list(found))
        _write(self.folder / "regret.csv", ["labels", *seeds], [[f"{cell:.6g}" for cell in row] for row in self.rows])

    def _measure(self, module: Any) -> Tensor:
        return self.best - value(_logps(module), self.reference, self.rewards, self.known["beta"])

    def _see(self, _: Any, arguments: tuple[Any, ...], __: Any) -> None:
        """Look for what is rare among completions that are being scored."""
        prompts, completions, _columns = arguments
        rare = self.known["rare"]
        for prompt, completion in zip(prompts, completions, strict=True):
            if f"{completion.strip()} ".startswith(f"{rare} "):
                seed = seed_of(prompt)
                if self.first[seed] is None:
                    self.first[seed] = (self.batches + 1) * self.known["pairs"]


def standard_error(values: Tensor) -> float:
    """Return the standard error of a mean; 0 where there is one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _logps(module: Any) -> Tensor:
    """Return the policy's log-probabilities, float64, as `value` takes them."""
    logits: Tensor = module.policy.logits
    return logits.detach().double().log_softmax(2)


def _write(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    os.replace(partial, path)
