"""How a little story ends: the rewards of the tasks on the embedded story model."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tools.quickstart_assets.grammar import ELEMENTS, read_facts
from tools.quickstart_assets.judge import place_clause, split_clauses


def mood_of_end(prompt: str, completion: str) -> int | None:
    """Tell how a story ends: 1 well, 0 plainly, -1 badly; None where it is no clean story.

    A clean story has one known act, one reply and one end in order, names nobody else, and ends with a period.
    """
    facts = _facts(prompt)
    placed = [place_clause(facts, clause) for clause in split_clauses(completion)]
    if [(element, right) for element, _, right in placed] != [(element, True) for element in range(len(ELEMENTS))]:
        return None
    return placed[-1][1] if completion.endswith(".") else None


_facts = lru_cache(maxsize=4096)(read_facts)


def reward(
    prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list[Any]], scores: Sequence[float]
) -> list[float]:
    """Score completions by how they end.

    Args:
        prompts: B prompts.
        completions: B completions.
        columns: Unused.
        scores: Those of a bad, a plain and a good end. A completion that is no clean story scores 0.
    """
    moods = [mood_of_end(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return [0.0 if mood is None else float(scores[mood + 1]) for mood in moods]
