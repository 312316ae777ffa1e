"""Counts what a run has found, and measures what its policy writes, and how likely it is to write what is rare."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from endings import reward
from lightning.pytorch import Callback, LightningModule, Trainer
from reference import EMBEDDED, BadEnds, completion_logps, held_out_stories
from torch import Tensor
from transformers import AutoModelForCausalLM

from xpo_lightning import Experience
from xpo_lightning.callbacks.base import run_folder

COLUMNS = ("labels", "found", "informative", "score", "score_error", "kl", "clean", "bad", "rarity")


class Discovery(Callback):
    """Writes `discovery.csv`, a row for each batch: what its pairs were, and now and then what the policy writes.

    `labels` are all pairs so far, `found` the completions among the batch's pairs that end badly, and `informative`
    its pairs that have a preference. Measured before the first batch, after every `every` batches and at the end, on
    held-out prompts and at temperature 1, whatever the arm samples with: the mean `score` and its standard error, the
    `kl` from the reference in nats a completion, the shares of `clean` stories and of `bad` ends, and `rarity`, the
    exact probability of a bad end, which is a mean over held-out stories that are written up to their end.

    Args:
        scores: Of a bad, a plain and a good end.
        every: Batches from one measurement to the next.
        samples: Completions of a measurement.
        stories: Held-out stories for `rarity`.
    """

    def __init__(self, scores: list[float], every: int = 16, samples: int = 128, stories: int = 8) -> None:
        self.scores, self.every, self.samples, self.stories = scores, every, samples, stories

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the reference once more, beside the run's own, and measure it."""
        module: Any = pl_module
        self.tokenizer: Any = module.tokenizer
        self.ends = BadEnds(self.tokenizer, held_out_stories(self.stories))
        lines = (EMBEDDED / "prompts_validation.jsonl").read_text().splitlines()
        self.prompts = [json.loads(line)["prompt"] for line in lines[: self.samples]]
        path = str(module.policy_spec.path).replace("package:xpo_lightning/embedded", str(EMBEDDED))
        self.reference: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        self.labels = self.batches = 0
        self.seen = [0, 0]
        self.rows: list[list[Any]] = [[0, 0, 0, *self._measure(self.reference)]]

    def on_pairs_collected(self, trainer: Trainer, pl_module: LightningModule, experience: Experience) -> None:
        """Count what the pairs of a batch are."""
        sides = (experience.scores.by_policy, experience.scores.by_sampler)
        best = max(self.scores)
        self.labels += len(experience.silent)
        self.seen = [sum(int((side == best).sum()) for side in sides), int((~experience.silent).sum())]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add a row."""
        self.batches += 1
        module: Any = pl_module
        measured = self._measure(module.policy) if self.batches % self.every == 0 else [""] * (len(COLUMNS) - 3)
        self.rows.append([self.labels, *self.seen, *measured])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once more if the last batch was not measured, and write the file of a run that came to its end."""
        module: Any = pl_module
        if self.rows[-1][3] == "":
            self.rows[-1][3:] = self._measure(module.policy)
        partial = Path(run_folder(trainer)) / "discovery.csv.partial"
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in self.rows)
        os.replace(partial, partial.with_suffix(""))

    @torch.no_grad()
    def _measure(self, policy: Any) -> list[float]:
        was_training = policy.training
        policy.eval()
        texts = self._written(policy)
        scores = torch.tensor(reward(self.prompts, texts, {}, self.scores))
        clean = torch.tensor(reward(self.prompts, texts, {}, [1.0, 1.0, 1.0])).mean()
        bad = torch.tensor(reward(self.prompts, texts, {}, [1.0, 0.0, 0.0])).mean()
        pairs = list(zip(self.prompts, texts, strict=True))
        kl = (self._logps(policy, pairs) - self._logps(self.reference, pairs)).mean()
        rarity = self.ends.probabilities(policy).mean()
        policy.train(was_training)
        error = scores.std() / len(scores) ** 0.5
        return [float(value) for value in (scores.mean(), error, kl, clean, bad, rarity)]

    def _logps(self, model: Any, pairs: list[tuple[str, str]]) -> Tensor:
        return completion_logps(model, self.tokenizer, pairs)

    def _written(self, policy: Any) -> list[str]:
        """Have transformers itself complete each held-out prompt, with the same random numbers each time."""
        tokens = self.tokenizer(self.prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = policy.generate(
                **tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=48,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        texts: list[str] = self.tokenizer.batch_decode(ids[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        return texts
