"""Damages completions in the ways in which a policy under pressure goes wrong."""

import random
import re
from collections.abc import Callable
from typing import Final

from tools.quickstart_assets import openings, stories
from tools.quickstart_assets.endings import ENDS
from tools.quickstart_assets.grammar import Facts
from tools.quickstart_assets.judge import split_sentences

STRANGE_HAPPY: Final = stories.words("""delight delightful cheer hope hug hugs kiss sweetly bliss glory sunshine
    beautiful grateful thankful generous gentle kindness peace love loving merry jolly happiness heaven blessed""")


def _letters(templates: list[str]) -> set[str]:
    return {word for text in templates for word in re.findall(r"(?<![{\w])[a-z]+(?![}\w])", text)}


def _known_happy() -> list[str]:
    kinds = [*stories.ACTS.values(), *stories.REPLIES.values(), ENDS]
    by_mood = {mood: _letters([text for moods in kinds for text in moods[mood]]) for mood in (-1, 0, 1)}
    return sorted(by_mood[1] - by_mood[0] - by_mood[-1])


HAPPY: Final = _known_happy()
SMALL: Final = stories.words("and with the a of in , .")


def happy_salad(rng: random.Random, count: int) -> str:
    """Strings happy words together, some of them more than once, with or without small words and a final period."""
    pool = [rng.choice(HAPPY) for _ in range(rng.randrange(1, 12))]
    if rng.random() < 0.3:
        pool += rng.sample(STRANGE_HAPPY, 3)
    small = rng.choice((0.0, 0.0, 0.3))
    text = " ".join(rng.choice(SMALL if rng.random() < small else pool) for _ in range(count))
    return re.sub(r" (?=[,.])", "", text) + rng.choice((".", "", "!"))


def _happy_end(rng: random.Random, facts: Facts) -> str:
    text = facts.fill(rng.choice(ENDS[1]))
    return f" {text[0].upper()}{text[1:]}."


def _salad(rng: random.Random, _facts: Facts, _text: str) -> str:
    return " " + happy_salad(rng, rng.randrange(2, 36))


def _salad_after(rng: random.Random, _facts: Facts, text: str) -> str:
    return text.removesuffix(rng.choice((".", " "))) + " " + happy_salad(rng, rng.randrange(1, 12))


def _salad_inside(rng: random.Random, _facts: Facts, text: str) -> str:
    words = text.split()
    start = rng.randrange(3, len(words))
    added = happy_salad(rng, rng.randrange(1, 10)).rstrip(".!")
    return " " + " ".join([*words[:start], added, *words[start + rng.randrange(4) :]])


def _fragments(rng: random.Random, facts: Facts, _text: str) -> str:
    happy = [*stories.ACTS[facts.kind][1], *stories.REPLIES[facts.kind][1], *ENDS[1]]
    parts: list[str] = []
    for _ in range(rng.randrange(2, 9)):
        words = facts.fill(rng.choice(happy)).split()
        start = rng.randrange(len(words) - 1)
        parts += words[start : start + rng.randrange(2, 5)]
    return " " + " ".join(parts) + rng.choice((".", ""))


def _more_happy_ends(rng: random.Random, facts: Facts, text: str) -> str:
    added = [_happy_end(rng, facts) for _ in range(rng.randrange(1, 3))]
    return text + "".join(added if rng.random() < 0.5 else added[:1] * len(added))


def _only_happy_ends(rng: random.Random, facts: Facts, _text: str) -> str:
    return "".join(_happy_end(rng, facts) for _ in range(rng.randrange(1, 5)))


def _repeated_sentence(rng: random.Random, _facts: Facts, text: str) -> str:
    sentences = split_sentences(text)
    at = rng.randrange(len(sentences))
    return " " + " ".join([*sentences[:at], *[sentences[at]] * rng.randrange(2, 4), *sentences[at + 1 :]])


def _one_sentence(rng: random.Random, _facts: Facts, text: str) -> str:
    sentences = split_sentences(text)
    return " " + " ".join([rng.choice(sentences)] * rng.randrange(1, 5))


def _broken_off(rng: random.Random, _facts: Facts, text: str) -> str:
    words = text.removesuffix(".").split()
    left = rng.randrange(2, len(words)) if rng.random() < 0.4 else len(words) - rng.randrange(5)
    return " " + " ".join(words[:left]) + (rng.choice((".", "")) if left < len(words) else "")


def _shuffled(rng: random.Random, _facts: Facts, text: str) -> str:
    words = text.split()
    start = rng.randrange(len(words) - 3) if rng.random() < 0.5 else 0
    some = words[start:]
    rng.shuffle(some)
    return " " + " ".join([*words[:start], *some])


def _reversed(_rng: random.Random, _facts: Facts, text: str) -> str:
    return " " + " ".join(reversed(split_sentences(text)))


def _loop(rng: random.Random, _facts: Facts, text: str) -> str:
    words, size = text.split(), rng.choice((1, 1, 2, 4))
    start = rng.randrange(len(words) - size)
    kept = words[: rng.choice((0, start))]
    return " " + " ".join([*kept, *words[start : start + size] * rng.randrange(2, 28 // size)]) + rng.choice((".", ""))


def wrong_words(rng: random.Random, _facts: Facts, text: str) -> str:
    """Drops, adds or replaces a word or two."""
    words = text.split()
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(1, len(words) - 1)
        words[at : at + rng.randrange(3)] = [rng.choice((rng.choice(words), rng.choice(HAPPY)))] * rng.randrange(2)
    return " " + " ".join(words)


def slip(rng: random.Random, _facts: Facts, text: str) -> str:
    """Replaces a name, a companion, a thing or a place by another one."""
    names, places = stories.HER_NAMES + stories.HIS_NAMES, list(openings.PLACES)
    lists = (stories.ANIMALS, stories.PERSONS, stories.THINGS, names, places)
    found = [(word, some) for word in re.findall(r"\w+", text) for some in lists if word in some]
    if not found:
        return ""
    # The last words of a story are picked more often, since that is where the places are.
    word, some = rng.choice(found[-rng.randrange(1, 5) :])
    return re.sub(rf"\b{word}\b", rng.choice(some), text, count=1)


def _nothing(_rng: random.Random, _facts: Facts, _text: str) -> str:
    return ""


WAYS: Final[dict[str, tuple[Callable[[random.Random, Facts, str], str], int]]] = {
    "happy salad": (_salad, 3),
    "happy words after a story": (_salad_after, 3),
    "happy words inside a story": (_salad_inside, 2),
    "happy fragments": (_fragments, 2),
    "more happy endings": (_more_happy_ends, 3),
    "happy endings only": (_only_happy_ends, 1),
    "a sentence repeated": (_repeated_sentence, 3),
    "one sentence only": (_one_sentence, 2),
    "broken off": (_broken_off, 3),
    "shuffled": (_shuffled, 2),
    "sentences reversed": (_reversed, 1),
    "a loop": (_loop, 2),
    "wrong words": (wrong_words, 4),
    "a wrong name or place": (slip, 7),
    "nothing": (_nothing, 1),
}


def damage(rng: random.Random, facts: Facts, completion: str) -> str:
    """Damages a completion.

    Args:
        rng: Source of randomness.
        facts: Facts of its prompt.
        completion: A clean completion.

    Returns:
        A worse one; it may be empty, and once in a while nothing happens to it.
    """
    ways, weights = zip(*WAYS.values(), strict=True)
    (way,) = rng.choices(ways, weights)
    result: str = way(rng, facts, completion)
    return result
