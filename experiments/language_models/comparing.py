"""Compares the arms of a task: paired differences, their p-values, and a table."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from results import Result
from tasks import ARMS, BASELINE

HEADER = (
    "arm", "seeds that found it", "labels to it (median)", "score", "less online DPO's", "p, corrected", "area", "KL",
    "probability", "clean",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A number of an arm less online DPO's, over the seeds that both have: mean, standard error, p-values.

    `corrected` is by Holm's method, over the arms of the task.
    """

    mean: float
    error: float
    p: float
    corrected: float = math.nan

    def __str__(self) -> str:
        """Say mean and standard error."""
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def differences(results: Sequence[Result], task: str, name: str) -> dict[str, Difference]:
    """Compare each arm of a task with online DPO, seed by seed, in a number of `Result`."""
    found = {}
    base = by_seed(results, task, BASELINE, name)
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
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    gains = differences(results, task, "score")
    for arm, name in ARMS.items():
        mine = [one for one in results if (one.task, one.arm) == (task, arm)]
        if mine:
            gain = gains.get(arm)
            cells = [
                name,
                f"{sum(one.found for one in mine)} of {len(mine)}",
                median([one.discovery if one.found else math.inf for one in mine], mine[0].labels),
                spread([one.score for one in mine]),
                *(("", "") if gain is None else (str(gain), f"{gain.corrected:.2g}")),
                spread([one.area for one in mine]),
                spread([one.kl for one in mine], 1),
                f"{math.exp(mean(math.log(one.rarity) for one in mine)):.0e}",
                f"{mean(one.clean for one in mine):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(page: str, results: Sequence[Result]) -> str:
    """Return a page with its tables written anew; that of a task stands between `<!-- table: TASK -->` and an end."""

    def written(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(results, found[2])}\n{found[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", written, page, flags=re.DOTALL)


def median(values: Sequence[float], most: int) -> str:
    """Say a median, which is beyond `most` where half of the values are infinite."""
    middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return f"> {most:,}" if math.isinf(middle[-1]) else f"{mean(middle):,.0f}"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 where there is one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Say a mean and its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"
