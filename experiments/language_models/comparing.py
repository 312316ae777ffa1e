"""Compares the arms of a task: paired differences, their p-values, and tables."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean, stdev

from results import Result
from tasks import ARMS, BASELINE, TASKS

HEADER = (
    "arm", "seeds that found it", "labels to it (median)", "score", "area", "KL", "score - beta KL", "probability",
    "clean",
)  # fmt: skip
COMPARED = {
    "discovery": ("labels to it", 0),
    "score": ("score", 3),
    "area": ("area", 3),
    "objective": ("score - beta KL", 2),
}
"""The numbers of a `Result` in which arms are compared: what they are called, and digits after the point."""

SMALLEST = 1e-38
"""The least probability in a geometric mean: a smaller one is rounded to 0 in float32."""


@dataclass(frozen=True)
class Difference:
    """A number of an arm less online DPO's, over the seeds that both have: mean, standard error, p-values.

    `corrected` is by Holm's method, over the arms of the task.
    """

    mean: float
    error: float
    p: float
    corrected: float = math.nan

    def said(self, digits: int) -> str:
        """Say mean, standard error, and the corrected p-value."""
        mean = round(self.mean, digits) + 0.0  # no sign of a rounding below 0
        return f"{mean:+,.{digits}f} ± {self.error:,.{digits}f} (p {self.corrected:.2g})"


def differences(results: Sequence[Result], task: str, name: str) -> dict[str, Difference]:
    """Compare each arm of a task with online DPO, seed by seed, in a number of `Result`.

    Tasks that are `rare` with other settings have no arm of online DPO of their own, and are compared with that one.
    """
    found = {}
    base = by_seed(results, task if BASELINE in TASKS[task].arms else "rare", BASELINE, name)
    for arm in (arm for arm in ARMS if arm != BASELINE):
        own = by_seed(results, task, arm, name)
        pairs = [own[seed] - base[seed] for seed in own if seed in base]
        if len(pairs) > 1:
            found[arm] = Difference(mean(pairs), standard_error(pairs), paired_p(pairs))
    return holm(found)


def paired_p(pairs: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired t-test; 1 where all differences are 0."""
    error = standard_error(pairs)
    if error == 0:
        return 1.0 if mean(pairs) == 0 else 0.0
    return two_sided_p(mean(pairs) / error, len(pairs) - 1)


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability that Student's t is further from 0, by its series for whole degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for place in range(2 + odd, degrees + 1, 2):  # powers of the cosine up to degrees - 2
        total += term
        term *= math.cos(angle) ** 2 * (place - 1) / place
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def holm(found: dict[str, Difference]) -> dict[str, Difference]:
    """Add the corrected p-values: the k-th smallest of n times n - k + 1, but at least the one before it."""
    least, corrected = 0.0, {}
    for place, arm in enumerate(sorted(found, key=lambda arm: found[arm].p)):
        one = found[arm]
        least = max(least, min(1.0, one.p * (len(found) - place)))
        corrected[arm] = Difference(one.mean, one.error, one.p, least)
    return {arm: corrected[arm] for arm in found}


def by_seed(results: Sequence[Result], task: str, arm: str, name: str) -> dict[int, float]:
    """Return a number of each seed of an arm."""
    return {one.seed: float(getattr(one, name)) for one in results if (one.task, one.arm) == (task, arm)}


def table(results: Sequence[Result], task: str) -> str:
    """Say in Markdown what came of the arms of a task."""
    lines = [_row(HEADER), _row(["---"] * len(HEADER))]
    for arm, name in ARMS.items():
        mine = [one for one in results if (one.task, one.arm) == (task, arm)]
        if mine:
            cells = [
                name,
                f"{sum(one.found for one in mine)} of {len(mine)}",
                median([one.discovery if one.found else math.inf for one in mine], mine[0].labels),
                *(spread([getattr(one, number) for one in mine]) for number in ("score", "area")),
                spread([one.kl for one in mine], 1),
                spread([one.objective for one in mine], 2),
                f"{geometric([one.rarity for one in mine]):.0e}",
                f"{mean(one.clean for one in mine):.2f}",
            ]
            lines.append(_row(cells))
    return "\n".join(lines)


def table_of_differences(results: Sequence[Result], task: str) -> str:
    """Say in Markdown how the arms of a task differ from online DPO, seed by seed."""
    by_number = {number: differences(results, task, number) for number in COMPARED}
    lines = [_row(["arm", *(title for title, _ in COMPARED.values())]), _row(["---"] * (1 + len(COMPARED)))]
    lines += [
        _row([name, *(by_number[number][arm].said(digits) for number, (_, digits) in COMPARED.items())])
        for arm, name in ARMS.items()
        if arm in by_number["score"]
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(page: str, results: Sequence[Result]) -> str:
    """Return a page with its tables written anew.

    A table stands between `<!-- table: TASK -->`, or `<!-- differences: TASK -->`, and `<!-- end -->`.
    """
    tables = {"table": table, "differences": table_of_differences}

    def written(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]](results, found[3])}\n{found[4]}"

    marks = r"(<!-- (table|differences): (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(marks, written, page, flags=re.DOTALL)


def median(values: Sequence[float], most: int) -> str:
    """Say a median, which is beyond `most` where half of the values are infinite."""
    middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return f"> {most:,}" if math.isinf(middle[-1]) else f"{mean(middle):,.0f}"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 where there is one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def geometric(probabilities: Sequence[float]) -> float:
    """Return the geometric mean of probabilities, none of which counts as less than `SMALLEST`."""
    return geometric_mean([max(probability, SMALLEST) for probability in probabilities])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Say a mean and its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"
