"""Draws prompts and completions from the word lists and templates."""

import itertools
import random
import re
import zlib
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Final

from tools.quickstart_assets import openings, stories
from tools.quickstart_assets.endings import ENDS

KINDS: Final = ("animal", "person", "mend")
ELEMENTS: Final = ("act", "reply", "end")
MOODS: Final = (-1, 0, 1)
MOOD_PULL: Final = 0.4
HELD_OUT_OF: Final = 8


@dataclass(frozen=True)
class Facts:
    """What a prompt fixes, and a completion must refer to.

    Attributes:
        kind: One of ``KINDS``.
        n: Name of the main person.
        o: The animal or the other person.
        x: The broken thing; empty unless the kind is ``mend``.
        spot: The short name of the place.
    """

    kind: str
    n: str
    o: str
    x: str
    spot: str

    @property
    def held_out(self) -> bool:
        """Whether prompts about this name and this animal or person belong to the validation split."""
        return zlib.crc32(f"{self.n} {self.o}".encode()) % HELD_OUT_OF == 0

    def fill(self, template: str) -> str:
        """Returns the template with every slot filled in."""
        pronouns = ("she", "her", "her") if self.n in stories.HER_NAMES else ("he", "him", "his")
        s, h, p = pronouns
        return template.format(n=self.n, o=self.o, x=self.x, spot=self.spot, s=s, h=h, p=p)


def upper_first(text: str) -> str:
    """Returns the text with a capital letter at its start."""
    return text[0].upper() + text[1:]


def draw_facts(rng: random.Random, held_out: bool) -> Facts:
    """Draws the facts of a new prompt.

    Args:
        rng: Source of randomness.
        held_out: Whether to draw from the validation split.

    Returns:
        Facts of the wanted split.
    """
    while True:
        kind = rng.choice(KINDS)
        facts = Facts(
            kind=kind,
            n=rng.choice(stories.HER_NAMES + stories.HIS_NAMES),
            o=rng.choice(stories.ANIMALS if kind == "animal" else stories.PERSONS),
            x=rng.choice(stories.THINGS) if kind == "mend" else "",
            spot=rng.choice(list(openings.PLACES)),
        )
        if facts.held_out == held_out:
            return facts


def draw_prompt(rng: random.Random, facts: Facts) -> str:
    """Draws the opening of a story: one or two sentences, with no space at the end."""
    look = rng.choice(stories.ANIMAL_LOOKS if facts.kind == "animal" else stories.PERSON_LOOKS)
    template = rng.choice(openings.OPENINGS[facts.kind])
    opening = template.format(
        **asdict(facts), job=rng.choice(stories.JOBS), look=look, a="a", place=openings.PLACES[facts.spot]
    )
    # A name never comes first, so that it is the same token in the prompt as in the completion.
    if template.startswith("{n}") or rng.random() < 0.5:
        opening = f"{rng.choice(openings.TIMES)}, {opening}"
    if rng.random() < 0.4:
        opening = f"{opening} {rng.choice(openings.SCENES)}"
    return upper_first(opening)


def draw_moods(rng: random.Random) -> tuple[int, int, int]:
    """Draws the moods of the three elements: independent but for a pull toward one mood of the story."""
    story = rng.choice(MOODS)
    act, reply, end = (story if rng.random() < MOOD_PULL else rng.choice(MOODS) for _ in ELEMENTS)
    return act, reply, end


def draw_completion(rng: random.Random, facts: Facts, moods: tuple[int, int, int]) -> str:
    """Draws the rest of a story, with the leading space that joins it to its prompt."""
    act, reply, end = moods
    subject = facts.fill(rng.choice(("{n}", "{s}", "{s}")))
    if rng.random() < 0.2:
        subject = f"{rng.choice(stories.LEADS)} {subject}"
    acted = facts.fill(rng.choice(stories.ACTS[facts.kind][act]))
    replied = facts.fill(rng.choice(stories.REPLIES[facts.kind][reply]))
    ended = facts.fill(rng.choice(ENDS[end]))
    contrast = act * reply < 0
    if rng.random() < 0.5:
        middle = f", {'but' if contrast else 'and'} {replied}"
    else:
        middle = f". But {replied}" if contrast else f". {upper_first(replied)}"
    return f" {upper_first(subject)} {acted}{middle}. {upper_first(ended)}."


def draw_story(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """Draws a prompt and a completion of the wanted split."""
    facts = draw_facts(rng, held_out)
    return draw_prompt(rng, facts), draw_completion(rng, facts, draw_moods(rng))


def draw_prompts(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Draws that many different prompts of the wanted split."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_prompt(rng, draw_facts(rng, held_out))] = None
    return list(found)


def read_facts(prompt: str) -> Facts:
    """Recovers the facts from a prompt that ``draw_prompt`` made.

    Args:
        prompt: The text of a prompt.

    Returns:
        Its facts.
    """
    words = re.findall(r"[A-Za-z]+", prompt)

    def pick(choices: list[str]) -> str:
        return next((word for word in words if word in choices), "")

    animal = pick(stories.ANIMALS)
    thing = pick(stories.THINGS) if "broken" in words else ""
    spot = next(spot for spot, phrase in openings.PLACES.items() if phrase in prompt)
    kind = "mend" if thing else "animal" if animal else "person"
    name = pick(stories.HER_NAMES + stories.HIS_NAMES)
    return Facts(kind=kind, n=name, o=animal or pick(stories.PERSONS), x=thing, spot=spot)


@lru_cache(maxsize=64)
def known_clauses(facts: Facts) -> dict[str, tuple[int, int]]:
    """Returns every clause that can follow these facts, with its element's position and its mood."""
    subjects = [facts.fill("{n}"), facts.fill("{s}")]
    subjects += [f"{lead} {subject}" for lead, subject in itertools.product(stories.LEADS, subjects)]
    known: dict[str, tuple[int, int]] = {}
    for mood in MOODS:
        for subject, act in itertools.product(subjects, stories.ACTS[facts.kind][mood]):
            known[upper_first(f"{subject} {facts.fill(act)}")] = (0, mood)
        for reply in stories.REPLIES[facts.kind][mood]:
            known[upper_first(facts.fill(reply))] = (1, mood)
        for end in ENDS[mood]:
            known[upper_first(facts.fill(end))] = (2, mood)
    return known


@cache
def loose_patterns(kind: str) -> list[tuple[re.Pattern[str], int, int]]:
    """Returns a pattern for each clause of a kind, whoever and whatever it names, with its element and its mood."""
    slots = {
        "n": stories.HER_NAMES + stories.HIS_NAMES,
        "o": stories.ANIMALS if kind == "animal" else stories.PERSONS,
        "x": stories.THINGS,
        "spot": list(openings.PLACES),
        "s": ["she", "he"],
        "h": ["her", "him"],
        "p": ["her", "his"],
    }
    choices = {slot: f"(?:{'|'.join([*words, *map(upper_first, words)])})" for slot, words in slots.items()}
    subject = f"(?:(?:{'|'.join(stories.LEADS)}) )?(?:{choices['n']}|{choices['s']}) "
    found: list[tuple[re.Pattern[str], int, int]] = []
    for mood in MOODS:
        found += [(re.compile(subject + act.format(**choices)), 0, mood) for act in stories.ACTS[kind][mood]]
        for element, clauses in ((1, stories.REPLIES[kind][mood]), (2, ENDS[mood])):
            found += [(re.compile(upper_first(clause).format(**choices)), element, mood) for clause in clauses]
    return found
