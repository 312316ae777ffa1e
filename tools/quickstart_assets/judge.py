"""The hidden true utility of a completion, and how likely a noisy label follows it."""

import math
import re
from typing import Final

from tools.quickstart_assets.grammar import ELEMENTS, Facts, known_clauses, loose_patterns, read_facts, upper_first

FAULT_COST: Final = 2.0
SLIP_COST: Final = 1.5
MISSING_COST: Final = 1.5
PATIENCE_WORDS: Final = 32
WORD_COST: Final = 0.05
FLOOR: Final = -6.0
LABEL_SCALE: Final = 1.2

_SENTENCE_END = re.compile(r"(?<=\.)\s+")
_JOINT = re.compile(r", (?:and|but) (?=the )")


def split_sentences(completion: str) -> list[str]:
    """Splits a completion into sentences, each with its period."""
    return _SENTENCE_END.split(completion.strip())


def split_clauses(completion: str) -> list[str]:
    """Splits a completion into clauses, each without its period and as it would be written at a sentence's start."""
    clauses: list[str] = []
    for sentence in split_sentences(completion):
        first, *rest = _JOINT.split(sentence.removesuffix("."))
        if first.startswith("But the "):
            first = upper_first(first.removeprefix("But "))
        clauses.extend(part for part in (first, *map(upper_first, rest)) if part)
    return clauses


def place_clause(facts: Facts, clause: str) -> tuple[int, int, bool]:
    """Finds what a clause is.

    Args:
        facts: Facts of the prompt.
        clause: A clause as ``split_clauses`` makes it.

    Returns:
        The position of its element, or -1 if it is none; its mood; whether it names the facts rightly.
    """
    if clause in known_clauses(facts):
        return *known_clauses(facts)[clause], True
    for pattern, element, mood in loose_patterns(facts.kind):
        if pattern.fullmatch(clause):
            return element, mood, False
    return -1, 0, False


def utility(prompt: str, completion: str) -> float:
    """Computes the true utility of any text as the rest of a story.

    A clean completion has an act, a reply and an end, and is worth the sum of their moods. A clause that names the
    wrong person, thing or place is a slip. A clause that is not of the grammar, out of order or repeated is a fault,
    and so is a last sentence without its period. Missing elements and words beyond a limit cost as well.

    Args:
        prompt: A prompt that the grammar made.
        completion: Any text.

    Returns:
        A number from -6 to 3.
    """
    facts = read_facts(prompt)
    total, done, faults, slips = 0.0, set[int](), 0, 0
    for clause in split_clauses(completion):
        element, mood, right = place_clause(facts, clause)
        if element <= max(done, default=-1):
            faults += 1
        else:
            done.add(element)
            total += mood
            slips += not right
    faults += not completion.rstrip().endswith(".")
    total -= FAULT_COST * faults + SLIP_COST * slips + MISSING_COST * (len(ELEMENTS) - len(done))
    total -= WORD_COST * max(0, len(completion.split()) - PATIENCE_WORDS)
    return max(total, FLOOR)


def is_clean(prompt: str, completion: str) -> bool:
    """Whether a completion has exactly one known act, reply and end, in order, and a final period."""
    facts = read_facts(prompt)
    placed = [place_clause(facts, clause) for clause in split_clauses(completion)]
    return [(element, right) for element, _, right in placed] == [
        (element, True) for element in range(len(ELEMENTS))
    ] and completion.endswith(".")


def probability(first: float, second: float) -> float:
    """Returns the Bradley-Terry probability that a label prefers the first of two utilities."""
    return 1.0 / (1.0 + math.exp(-LABEL_SCALE * (first - second)))
