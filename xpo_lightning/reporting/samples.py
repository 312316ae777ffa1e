"""Puts a policy's completions before and after training side by side, from `completions.jsonl`."""

import json
from dataclasses import dataclass
from typing import Any

from xpo_lightning.core.errors import InputError

Row = dict[str, Any]
_KINDS: list[tuple[str, Any]] = [
    *(("policy", str), ("reference", str), ("policy_score", float), ("reference_score", float), ("label", float)),
    *(("policy_ended", bool), ("reference_ended", bool)),
]
"""Type of each column of `completions.jsonl` besides `step` and `prompt`."""


@dataclass(frozen=True)
class Completion:
    """A completion with its score and verdict.

    Args:
        writer: The model that wrote it, and at which step.
        text: The completion's text.
        score: Its score by the reward.
        verdict: Its result against the reference's: `won`, `lost`, `tie`, or the probability that it is better; empty
            for the reference's own.
        ended: Whether it ended by itself.
    """

    writer: str
    text: str
    score: float
    verdict: str
    ended: bool


@dataclass(frozen=True)
class Sample:
    """A prompt and its completions.

    Args:
        prompt: Messages as role and text; a plain prompt is one message without a role.
        written: The policy's completions in order of steps, then the reference's.
    """

    prompt: list[tuple[str, str]]
    written: list[Completion]


def samples_of(lines: str) -> list[Sample]:
    """Collect the completions of the first and the last validation for each prompt.

    A prompt that one of them lacks, because the number of shown rows was changed, has only those of the other.

    Args:
        lines: The content of `completions.jsonl`.

    Raises:
        InputError: A line was not written by `CompletionsTable`.
    """
    validations = _validations(lines)
    if not validations:
        return []
    first, last = min(validations), max(validations)
    samples = []
    for key, row in {**validations[first], **validations[last]}.items():
        rows = {step: validations[step][key] for step in sorted({first, last}) if key in validations[step]}
        samples.append(Sample(_messages(row["prompt"]), _written(rows)))
    return samples


def _validations(lines: str) -> dict[int, dict[tuple[str, int], Row]]:
    """Group rows by step, then by prompt and its number among equal prompts; a repeated step replaces earlier rows."""
    validations: dict[int, dict[tuple[str, int], Row]] = {}
    step_before = -1
    for number, line in enumerate(lines.split("\n"), 1):
        row = _row(line, number) if line.strip() else None
        if row is None:
            continue
        step = row["step"]
        if step < step_before:
            validations = {earlier: rows for earlier, rows in validations.items() if earlier < step}
        rows = validations.setdefault(step, {})
        prompt, step_before = json.dumps(row["prompt"]), step
        rows[prompt, sum(other == prompt for other, _ in rows)] = row
    return validations


def _row(line: str, number: int) -> Row | None:
    """Read a line; return None for an incomplete one, which a process killed while writing may leave."""
    try:
        row: Row = json.loads(line)
        return {"step": int(row["step"]), "prompt": row["prompt"], **{name: kind(row[name]) for name, kind in _KINDS}}
    except json.JSONDecodeError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"completions.jsonl, line {number} is no row of CompletionsTable: {error!r:.80}") from error


def _written(rows: dict[int, Row]) -> list[Completion]:
    several = len(rows) > 1
    policy = [_completion(row, "policy", f"Policy, step {step}") for step, row in rows.items()]
    texts = {row["reference"] for row in rows.values()}
    if several and len(texts) == 1:  # The usual case: every validation draws the same random numbers.
        return [*policy, _completion([*rows.values()][-1], "reference", "Reference, both times")]
    return [*policy, *(_completion(row, "reference", f"Reference, step {step}") for step, row in rows.items())]


def _completion(row: Row, side: str, writer: str) -> Completion:
    label = row["label"]
    verdict = {0.0: "lost", 0.5: "tie", 1.0: "won"}.get(label, f"won with probability {label:.2f}")
    return Completion(
        writer=writer,
        text=row[side],
        score=row[f"{side}_score"],
        verdict=verdict if side == "policy" else "",
        ended=row[f"{side}_ended"],
    )


def _messages(prompt: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [(str(message.get("role", "")), str(message.get("content", ""))) for message in prompt]
    return [("", str(prompt))]
