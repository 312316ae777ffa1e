"""What each section of the configuration page promises of a run with its block."""

import csv
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configuration_page import Run
from torch import Tensor

from xpo_lightning import BufferOptions, Candidates, LabelRule, ReferenceRefresh
from xpo_lightning.callbacks import CompletionsTable, PolicyExport, RunCheckpoint
from xpo_lightning.rewards.llm_judge import is_exchanged

BETA, PENALTY = 0.3, 1.0  # the quickstart's


def penalized(run: Run, side: str, score: Callable[[str], float]) -> list[float]:
    written = getattr(run.pairs[0].completions, side)
    cut = (~written.ended).tolist()
    return [score(text) - PENALTY * one for text, one in zip(written.texts, cut, strict=True)]


def unpenalized(run: Run) -> list[float]:
    """Give the reward's own scores of both sides."""
    pairs = run.pairs[0]
    sides = [(getattr(pairs.scores, side), getattr(pairs.completions, side)) for side in ("by_policy", "by_sampler")]
    return torch.cat([scores + PENALTY * ~written.ended for scores, written in sides]).tolist()


def margins(run: Run) -> Tensor:
    scores = run.pairs[0].scores
    return scores.by_policy - scores.by_sampler


def scored(score: Callable[[str], float]) -> Callable[[Run], bool]:
    return lambda run: all(
        getattr(run.pairs[0].scores, side).tolist() == pytest.approx(penalized(run, side, score))
        for side in ("by_policy", "by_sampler")
    )


def shorter_wins(run: Run) -> bool:
    """A pair without an answer is left out, or is a tie, as the judge says."""
    pairs = run.pairs[0]
    texts = zip(pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts, strict=True)
    signs = [(len(other) > len(own)) - (len(other) < len(own)) for own, other in texts]
    wanted = [(1 + sign) / 2 for sign in signs]
    return pairs.labels.tolist() == wanted and {*wanted} > {0.5}


def first_shown_wins(run: Run) -> bool:
    pairs = run.pairs[0]
    texts = (pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts)
    triples = zip(pairs.prompts.raw, *texts, strict=True)
    wanted = [0.5 if own == other else float(not is_exchanged(raw, own, other)) for raw, own, other in triples]
    return pairs.labels.tolist() == wanted


def first_loss(expected: float) -> Callable[[Run], bool]:
    """Policy and reference are equal at first, so each margin is 0; identical completions have no loss."""
    return lambda run: run.of("loss/dpo")[0] == pytest.approx(expected * (1 - run.of("pairs/identical")[0]), rel=1e-4)


def bonus_of(*sums: str) -> Callable[[Run], bool]:
    return lambda run: all(
        step["loss/xpo"] == pytest.approx(step["alpha"] * sum(step[name] for name in sums), rel=1e-4) and step["alpha"]
        for step in run.steps
    )


def alphas(*expected: float) -> Callable[[Run], bool]:
    return lambda run: run.of("alpha") == pytest.approx(expected)


def is_a(part: str, name: str) -> Callable[[Run], bool]:
    """See that a part of the module is of this class; `part` is an attribute, or several with dots."""

    def check(run: Run) -> bool:
        value: Any = run.module
        for attribute in part.split("."):
            value = getattr(value, attribute)
        return type(value).__name__ == name

    return check


def every(*checks: Callable[[Run], Any]) -> Callable[[Run], bool]:
    return lambda run: all(bool(check(run)) for check in checks)


def follows(mix: float) -> Callable[[Run], bool]:
    """The second pairs are measured against the refreshed reference: a copy of the policy makes their KL 0."""
    options = ReferenceRefresh(1, mix)
    return lambda run: (
        run.module.reference_refresh == options and (abs(run.of("objective/kl")[1]) < 1e-4) == (mix == 1.0)
    )


def kept(options: BufferOptions, pairs: int) -> Callable[[Run], bool]:
    """See how many pairs the next batch will find."""
    return lambda run: run.module.buffer_options == options and len(run.module.memory.buffer.store.sizes) == pairs


def best_is_kept(run: Run) -> bool:
    callbacks = {type(one): one for one in run.trainer.callbacks}
    export, checkpoint = callbacks[PolicyExport], callbacks[RunCheckpoint]
    assert isinstance(export, PolicyExport)
    assert isinstance(checkpoint, RunCheckpoint)
    with (run.folder / "metrics.csv").open() as lines:
        values = [row["eval/objective/rlhf_reward"] for row in csv.DictReader(lines)]
    best = max(float(value) for value in values if value)
    assert checkpoint.best_model_path
    assert float(checkpoint.best_model_score) == pytest.approx(best)
    return export.best == pytest.approx(best) and (run.folder / "policy" / "config.json").is_file()


SIGMOID = math.log(2)
CHECKS: dict[str, Callable[[Run], Any]] = {
    "Reward model": lambda run: run.module.reward.max_tokens == 128 and run.module.reward.model is not None,
    "Python reward": scored(lambda text: -abs(len(text.split()) - 20)),
    "Verified answers": every(
        scored(lambda text: 0.0),  # stories have no answer
        lambda run: run.module.reward.verifier == "math" and run.module.reward.format_score == 0.1,
    ),
    "Reward over HTTP": scored(lambda text: -float(len(text))),
    "Weighted rewards": every(
        lambda run: run.module.reward.weights == (1.0, 0.5),
        lambda run: sum(unpenalized(run)) == pytest.approx(0, abs=1e-4),
    ),
    "Local judge": lambda run: run.module.reward.both_orders and "pairs/unanswered" in run.steps[0],
    "HTTP judge": lambda run: {round(one, 3) for one in run.pairs[0].scores.by_policy.tolist()} <= {0.1, 0.9, 0.5},
    "Python judge": every(shorter_wins, lambda run: bool(run.pairs[0].silent.any())),
    "Human judge": every(is_a("reward", "HumanJudge"), first_shown_wins),
    "Pairs without an answer": every(
        shorter_wins, lambda run: run.of("pairs/unanswered")[0] > 0 and not run.pairs[0].silent.any()
    ),
    "Higher score": lambda run: run.module.label_rule == LabelRule("argmax", "random"),
    "Drawn labels": lambda run: (
        run.module.label_rule == LabelRule("bradley_terry") and set(run.pairs[0].labels.tolist()) <= {0.0, 1.0}
    ),
    "Soft labels": lambda run: run.pairs[0].labels.tolist() == pytest.approx(torch.sigmoid(margins(run)).tolist()),
    "Temperature": lambda run: run.pairs[0].labels.tolist() == pytest.approx(torch.sigmoid(margins(run) / 2).tolist()),
    "Flipped labels": lambda run: (
        0.0 < ((2 * run.pairs[0].labels - 1) * margins(run) < 0).float().mean() < 0.3
        and run.module.label_rule == LabelRule(flip=0.1)
    ),
    "Least margin": lambda run: (
        torch.equal(run.pairs[0].silent, margins(run).abs() < 0.5) and run.pairs[0].silent.any()
    ),
    "Best of each side": lambda run: run.module.candidates == Candidates(4, "best_of_each"),
    "Largest margin": lambda run: run.module.candidates == Candidates(4, "largest_margin"),
    "Best and worst": every(
        lambda run: run.module.candidates == Candidates(4, "best_and_worst"), is_a("sampler", "PolicySampler")
    ),
    "Tournament": every(
        lambda run: run.module.candidates == Candidates(4, "best_of_each", "tournament"),
        lambda run: 1 < run.of("pairs/comparisons")[0] <= 7,
    ),
    "All pairs of a prompt": every(
        lambda run: run.module.candidates == Candidates(4, "best_and_worst", "all_pairs", 12),
        lambda run: 1 < run.of("pairs/comparisons")[0] <= 13,
    ),
    "DPO": lambda run: run.steps[0]["loss/xpo"] == 0 and "objective/kl" not in run.steps[0] and not run.pairs,
    "Beside sampled pairs": lambda run: "pairs/truncated" in run.steps[0] and len(run.pairs[0]) > 0,
    "Reference": is_a("sampler", "ReferenceSampler"),
    "Online DPO": every(is_a("sampler", "PolicySampler"), alphas(0.0, 0.0)),
    "The policy with a bonus": every(is_a("sampler", "PolicySampler"), bonus_of("logps/chosen", "logps/rejected")),
    "Previous policy": every(is_a("sampler", "PreviousPolicySampler"), lambda run: run.module.sampler.every == 10),
    "Historical policies": every(
        is_a("sampler", "HistoricalPolicySampler"),
        lambda run: (run.module.sampler.every, run.module.sampler.keep) == (10, 4),
    ),
    "Mixture": every(is_a("sampler", "MixtureSampler"), lambda run: run.module.sampler.reference_share == 0.25),
    "PILAF": every(is_a("sampler", "PILAFSampler"), lambda run: run.module.sampler.beta == 0.1),
    "Python sampler": lambda run: all(
        text and "They lived happily ever after.".startswith(text) for text in run.pairs[0].completions.by_sampler.texts
    ),
    "Rejected completion": bonus_of("logps/rejected"),
    "Another bonus": every(is_a("objective.bonus", "GEBBonus"), bonus_of("logps/rejected")),
    "Third completion": every(
        is_a("bonus_sampler", "ReferenceSampler"),
        lambda run: run.of("loss/xpo")[0] == pytest.approx(1e-5 * float(run.pairs[0].sample.reference_logps.mean())),
    ),
    "Clipped bonus": lambda run: run.module.objective.bonus_clip == 500.0,
    "Alpha in beta": every(alphas(0.05 * BETA, 0.05 * BETA), is_a("objective.alpha", "Constant")),
    "Alpha by epoch": every(alphas(1e-5, 5e-6), is_a("objective.alpha", "PerEpoch")),
    "Alpha on a line": alphas(1e-4, 1e-4 * 39 / 40),
    "Alpha on a cosine": alphas(1e-4, 1e-4 * (1 + math.cos(math.pi / 40)) / 2),
    "All pairs": every(kept(BufferOptions("all"), 8), lambda run: run.trainer.global_step == 16),
    "Last batches": kept(BufferOptions(4), 12),
    "Pairs on disk": every(
        kept(BufferOptions("all", 100), 128), lambda run: bool([*run.folder.glob("pairs-0-*.sqlite")])
    ),
    "Alpha by iteration": every(alphas(1e-5, 5e-6), is_a("objective.alpha", "PerIteration")),
    "New reference": follows(1.0),
    "Reference that follows": follows(0.1),
    "Best iterate": best_is_kept,
    "Sigmoid": every(first_loss(SIGMOID), is_a("objective.preference_loss", "SigmoidLoss")),
    "Hinge": first_loss(1.0),
    "IPO": first_loss((1 / (2 * BETA)) ** 2),
    "Robust": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.flip_rate == 0.1),
    "Label smoothing": lambda run: run.module.objective.preference_loss.label_smoothing == 0.1,
    "DPO-Positive": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.penalty == 5.0),
    "Length-normalised": lambda run: run.module.objective.preference_loss.length_normalized,
    "Nash-MD": every(first_loss(0.0), is_a("objective.preference_loss", "NashMDLoss")),
    "SPPO": first_loss(2 * (1 / (2 * BETA)) ** 2),
    "INPO": first_loss((0.25 / (2 * BETA)) ** 2),
    "Other divergences": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.margin_clip == 10),
    "Mixed losses": every(first_loss(1.0), lambda run: run.module.objective.preference_loss.weights == [1.0, 0.2]),
    "Entropy bonus": lambda run: all(
        step["loss/total"] - step["loss/dpo"] - step["loss/xpo"]
        == pytest.approx(-0.01 * step["objective/token_entropy"], abs=1e-5)
        for step in run.steps
    ),
    "Other callbacks": lambda run: (
        [one.rows for one in run.trainer.callbacks if isinstance(one, CompletionsTable)] == [3]
        and "throughput/tokens_per_second" in run.steps[-1]
    ),
    "Own loss": every(first_loss(1.0), is_a("objective.preference_loss", "SquaredHinge")),
}
# Blocks of whose kind another one is run by default.
SLOW = {
    *("Higher score", "Drawn labels", "Temperature", "Best of each side", "Largest margin"),
    *("Reference", "Online DPO", "Previous policy", "Mixture", "Rejected completion", "Clipped bonus"),
    *("Alpha on a line", "Alpha on a cosine", "Alpha in beta", "Last batches", "Pairs on disk", "New reference"),
    *("Reward model", "Reward over HTTP", "Python judge", "Pairs without an answer", "Soft labels", "Least margin"),
    *("All pairs of a prompt", "DPO", "The policy with a bonus", "Alpha by iteration", "Sigmoid", "Length-normalised"),
    *("Hinge", "Robust", "Label smoothing", "DPO-Positive", "Nash-MD", "SPPO", "INPO", "Mixed losses"),
}
# What a run needs beside `SIZES` to show what it is to show.
NEEDS: dict[str, dict[str, Any]] = {
    "Flipped labels": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Least margin": {"data__batch_size": 32, "trainer__max_steps": 1},
    "Python judge": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Pairs without an answer": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Alpha by epoch": {"trainer__limit_train_batches": 1},
    "All pairs": {"trainer__max_steps": 16},
    "Last batches": {"trainer__max_steps": 5},
    "Pairs on disk": {"data__batch_size": 64},
    "Best iterate": {
        "trainer__enable_checkpointing": True,
        "trainer__limit_val_batches": 1,
        "data__validation_batch_size": 4,
    },
}
