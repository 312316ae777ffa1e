"""Converts pairs to rows for tables and files: the prompt, both completions, their scores and the label."""

import json
from typing import IO, Any

from xpo_lightning.core.batch import Experience, RawPrompt

Row = dict[str, Any]


def pair_rows(experience: Experience) -> list[Row]:
    """Convert B pairs to B rows of plain values.

    Returns:
        Rows with `prompt` (as the data has it), `policy` and `reference` (the completions), their scores, `label` (the
        probability that the policy's completion is better), and whether each completion ended by itself.
    """
    policy, reference = experience.completions.by_policy, experience.completions.by_sampler
    columns = {
        "prompt": experience.prompts.raw,
        "policy": policy.texts,
        "reference": reference.texts,
        "policy_score": experience.scores.by_policy.tolist(),
        "reference_score": experience.scores.by_sampler.tolist(),
        "label": experience.labels.tolist(),
        "policy_ended": policy.ended.tolist(),
        "reference_ended": reference.ended.tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def prompt_text(prompt: RawPrompt) -> str:
    """Return a prompt as text; a conversation has one `role: content` line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def append_rows(file: IO[str], rows: list[Row]) -> None:
    """Write rows as JSON lines; values without a JSON type, such as dates in a dataset's columns, become text."""
    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
