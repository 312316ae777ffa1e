"""The table of what was compared, as Markdown."""

import math
import re
from collections import Counter
from pathlib import Path

import transformers

from zoo import families, rewards
from zoo.compare import Outcome
from zoo.strangers import STRANGERS


class Outcomes(dict[tuple[str, str], Outcome]):
    """What came of each family, by its name and the mode."""

    def of(self, name: str) -> dict[str, Outcome]:
        """Return the outcomes of a family by mode."""
        return {mode: outcome for (each, mode), outcome in self.items() if each == name}


INTRODUCTION = """# Models

Which families of models this package trains, and how it is known. Written by `python tests/zoo --markdown
docs/models.md` with transformers {version}; do not edit it by hand.

For each family a tiny random model takes one XPO step, and a naive loop, which runs each row alone, unpadded and
without a cache, computes the same step. Windows, chunks and context marks of the models are short enough for the rows
to cross them. The table gives the largest differences in float32: of log-probabilities in nats, and of gradients
relative to the largest of their tensor. In bfloat16, `right` means that the step is about as far from the float32 loop
as the naive loop in bfloat16 is. `no dropout`: the model's config asks for dropout, and `policy.dropout` is 0.
`reward`: the largest difference of a score, as a sequence classifier. `refused` is one line before the first step,
given below. Models of the zoo's own, which are in no list of transformers: {strangers}.

{counts}
"""
TEMPORARY = r"/tmp/\w+"  # noqa: S108
HEADER = "family path log-probabilities gradients LoRA bfloat16 bfloat16&nbsp;LoRA no&nbsp;dropout reward"


def write_table(file: Path, outcomes: Outcomes) -> None:
    """Write what was compared."""
    names = list(dict.fromkeys(name for name, _ in outcomes))
    title = INTRODUCTION.format(
        version=transformers.__version__, counts=_counts(outcomes), strangers=", ".join(STRANGERS)
    )
    header = HEADER.split()
    lines = [
        title,
        _row(header),
        _row(["---"] * len(header)),
        *(_row(_cells(name, outcomes.of(name))) for name in names),
    ]
    refusals = {name: _refusal(outcomes.of(name)) for name in names}
    lines += ["", "## Refused", "", *(f"- {name}: {said}" for name, said in refusals.items() if said)]
    lines += ["", "## Not tried", "", *(f"- {name}: {why}" for name, why in families.UNBUILDABLE.items())]
    lines += [f"- {name}, as a reward: {why}" for name, why in rewards.UNBUILDABLE.items()]
    file.write_text("\n".join(lines) + "\n")


def _counts(outcomes: Outcomes) -> str:
    """Say how many families go which way."""
    steps = [outcome for (_, mode), outcome in outcomes.items() if mode == "float32"]
    counts = Counter(outcome.path if outcome.kind == "right" else outcome.kind for outcome in steps)
    said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f"Of {len(steps)} families and variants: {said}."


def _cells(name: str, by_mode: dict[str, Outcome]) -> list[str]:
    full, lora = by_mode.get("float32"), by_mode.get("float32 LoRA")
    words = [by_mode[mode].kind if mode in by_mode else "" for mode in ("bfloat16", "bfloat16 LoRA", "float32 dropout")]
    reward = by_mode.get("reward")
    return [
        name,
        full.path if full else "",
        _number(full, full and max(full.kept, full.reference)),
        _number(full, full and full.gradients),
        _number(lora, lora and max(lora.kept, lora.reference, lora.gradients)),
        *words,
        _number(reward, reward and reward.score),
    ]


def _number(outcome: Outcome | None, error: float | None) -> str:
    if outcome is None or error is None:
        return ""
    return f"{error:.0e}" if outcome.kind == "right" and not math.isnan(error) else outcome.kind


def _refusal(by_mode: dict[str, Outcome]) -> str | None:
    """Return the first refusal of a family, with the mode that it was in."""
    said = ((mode, outcome.message) for mode, outcome in by_mode.items() if outcome.kind == "refused")
    return next((f"{re.sub(TEMPORARY, 'FOLDER', message)} ({mode})" for mode, message in said), None)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
