"""Counts what a run has found, and measures what its policy writes, and how likely it is to write what is rare."""

import csv
import json
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import endings
import sums
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from reference import EMBEDDED, BadEnds, completion_logps, held_out_stories
from transformers import AutoModelForCausalLM

from xpo_lightning import Experience
from xpo_lightning.callbacks.base import run_folder
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.data.reasoning_tasks import read_task

MEASURED = ("score", "score_error", "kl", "clean", "best", "rarity")
COLUMNS = ("labels", "found", "informative", *MEASURED)


class Finds(Callback):
    """Writes `discovery.csv`, a row for each batch: what its pairs were, and now and then what the policy writes.

    `labels` are all pairs so far, `found` the completions among the batch's pairs that have the best score, and
    `informative` its pairs that have a preference. Measured before the first batch, after every `every` batches and at
    the end, on held-out prompts and at temperature 1, whatever the arm samples with: the mean `score` and its standard
    error, the `kl` from the reference in nats a completion, the shares of `clean` completions and of the `best`, and
    `rarity`, the exact probability of what has the best score.

    Args:
        best: The best score.
        every: Batches from one measurement to the next.
    """

    def __init__(self, best: float, every: int) -> None:
        self.best, self.every = best, every

    @abstractmethod
    def prepare(self, module: Any) -> None:
        """Get what measurements need."""

    @abstractmethod
    def measure(self, policy: Any) -> Sequence[float]:
        """Return the numbers of `MEASURED`; the policy is in eval mode."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy before its first batch, which is its reference."""
        self.prepare(pl_module)
        self.labels = self.batches = 0
        self.seen = [0, 0]
        self.rows: list[list[Any]] = [[0, 0, 0, *self._measured(pl_module)]]

    def on_pairs_collected(self, trainer: Trainer, pl_module: LightningModule, experience: Experience) -> None:
        """Count what the pairs of a batch are."""
        sides = (experience.scores.by_policy, experience.scores.by_sampler)
        self.labels += len(experience.silent)
        found = sum(int((side == self.best).sum()) for side in sides)
        self.seen = [found, int((~experience.silent).sum())]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add a row."""
        self.batches += 1
        measured = self._measured(pl_module) if self.batches % self.every == 0 else [""] * len(MEASURED)
        self.rows.append([self.labels, *self.seen, *measured])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once more if the last batch was not measured, and write the file of a run that came to its end."""
        if self.rows[-1][-1] == "":
            self.rows[-1][-len(MEASURED) :] = self._measured(pl_module)
        with replacing_file(run_folder(trainer) / "discovery.csv", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in self.rows)

    @torch.no_grad()
    def _measured(self, module: Any) -> list[float]:
        policy = module.policy
        was_training = policy.training
        numbers = [float(number) for number in self.measure(policy.eval())]
        policy.train(was_training)
        return numbers


class Discovery(Finds):
    """Finds bad ends of stories.

    A completion is clean if it is a clean story; `rarity` is a mean over held-out stories that are written up to their
    end.

    Args:
        scores: Of a bad, a plain and a good end.
        every: See `Finds`.
        samples: Completions of a measurement.
        stories: Held-out stories for `rarity`.
    """

    def __init__(self, scores: list[float], every: int = 16, samples: int = 128, stories: int = 8) -> None:
        super().__init__(max(scores), every)
        self.scores, self.samples, self.stories = scores, samples, stories

    def prepare(self, module: Any) -> None:
        """Load the reference once more, beside the run's own."""
        self.tokenizer: Any = module.tokenizer
        self.ends = BadEnds(self.tokenizer, held_out_stories(self.stories))
        lines = (EMBEDDED / "prompts_validation.jsonl").read_text().splitlines()
        self.prompts = [json.loads(line)["prompt"] for line in lines[: self.samples]]
        path = str(module.policy_spec.path).replace("package:xpo_lightning/embedded", str(EMBEDDED))
        self.reference: Any = AutoModelForCausalLM.from_pretrained(path).eval()

    def measure(self, policy: Any) -> Sequence[float]:
        """See `Finds.measure`."""
        texts = sampled(policy, self.tokenizer, self.prompts, 48)
        scores, clean, bad = (
            torch.tensor(endings.reward(self.prompts, texts, {}, each))
            for each in (self.scores, [1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
        )
        pairs = list(zip(self.prompts, texts, strict=True))
        own, other = (completion_logps(model, self.tokenizer, pairs) for model in (policy, self.reference))
        rarity = self.ends.probabilities(policy).mean()
        numbers = (scores.mean(), scores.std() / len(scores) ** 0.5, (own - other).mean(), clean.mean(), bad.mean())
        return [float(number) for number in (*numbers, rarity)]


class RightAnswers(Finds):
    """Finds right answers to sums.

    A completion is clean if it is a number and nothing else; `rarity` is the mean probability of the right answer's
    tokens.

    Args:
        source: Held-out problems: a task of reasoning-gym.
        every: See `Finds`.
        tokens: Most tokens of an answer.
    """

    def __init__(self, source: str, every: int, tokens: int) -> None:
        super().__init__(1.0, every)
        self.source, self.tokens = source, tokens

    def prepare(self, module: Any) -> None:
        """Read the problems."""
        self.tokenizer: Any = module.tokenizer
        rows = [row for _, row in read_task(self.source, "source")]
        self.prompts, self.answers = [str(row["prompt"]) for row in rows], [str(row["answer"]) for row in rows]

    def measure(self, policy: Any) -> Sequence[float]:
        """See `Finds.measure`."""
        texts = [sums.cut(text) for text in sampled(policy, self.tokenizer, self.prompts, self.tokens)]
        scores = torch.tensor(sums.reward(self.prompts, texts, {"answer": self.answers}))
        pairs = list(zip(self.prompts, texts, strict=True))
        right = [(prompt, f" {answer}") for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        own, rarity = self._logps(policy, pairs), self._logps(policy, right).exp().mean()
        other = self._logps(policy, pairs, policy.disable_adapter())
        numbers = (scores.mean(), scores.std() / len(scores) ** 0.5, (own - other).mean(), (scores > 0).float().mean())
        return [float(number) for number in (*numbers, (scores == 1).float().mean(), rarity)]

    def _logps(
        self, policy: Any, pairs: list[tuple[str, str]], within: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        with within or nullcontext():
            return completion_logps(policy, self.tokenizer, pairs, is_ended=False)


def sampled(policy: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """Have transformers itself complete prompts at temperature 1, with the same random numbers each time."""
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = policy.generate(
            **given, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(ids[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return texts
