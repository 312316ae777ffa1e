"""Verifies answers, one JSON line in and one out: run as a script, so that it imports nothing that takes memory.

A process of its own can be ended, where a function that is lost in a huge power or a LaTeX bomb cannot.
"""

import json
import resource
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space; an answer that needs more is a wrong one

Verify = Callable[[str, Any, Any], float]
"""Maps the given answer, the right one and the row's metadata to a score from 0 to 1."""


def math() -> Verify:
    """Return a verifier of numbers, expressions and LaTeX, by math-verify."""
    library = import_module("math_verify")
    parse = partial(library.parse, parsing_timeout=None)

    @cache
    def right(answer: str) -> Any:
        """Parse the row's answer; a bare LaTeX expression is read as one in dollars."""
        return parse(f"${answer}$") or parse(answer)

    def score(given: str, answer: Any, metadata: Any) -> float:
        parsed = parse(given)
        return float(bool(parsed) and library.verify(right(str(answer)), parsed, timeout_seconds=None))

    return score


def reasoning_gym() -> Verify:
    """Return the scorers of reasoning-gym's tasks; the metadata names the task."""
    scorer = cache(import_module("reasoning_gym").get_score_answer_fn)

    def score(given: str, answer: Any, metadata: Any) -> float:
        entry = {"question": "", "answer": answer, "metadata": metadata}
        return float(scorer(metadata["source_dataset"])(given, entry))

    return score


def exact() -> Verify:
    """Return a verifier that compares texts, spaces around them aside."""
    return lambda given, answer, metadata: float(given.strip() == str(answer).strip())


def main() -> None:
    """Answer each line of standard input: `{"score": 1.0}`, or `{"error": "..."}` if the verifier failed."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    verify: Verify = {"math": math, "reasoning_gym": reasoning_gym, "exact": exact}[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"score": verify(*json.loads(line))}
        except (Exception, RecursionError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
