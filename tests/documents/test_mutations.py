"""The table of mutations fits the code: each can still be made, and the tests that are to notice it exist."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutation_table import MUTATIONS, Mutation
from mutations import faults

TESTS = Path(__file__).parents[1]
ENTRY = Mutation("rng: no stream", "core/rng.py", "int(self.stream), ", "", "core rollout/test_rollout.py")


def test_every_mutation_fits_the_code():
    assert [fault for mutation in MUTATIONS for fault in faults(mutation)] == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 80


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"old": "no such text"}, "its old text is 0 times in core/rng.py, not once"),
        ({"old": "self."}, "times in core/rng.py, not once"),
        ({"new": ENTRY.old}, "its new text is the old one"),
        ({"new": "(, "}, "its new text does not parse"),
        ({"tests": "core rollout/test_nothing.py"}, "there is no rollout/test_nothing.py in tests"),
        ({"tests": "test_nothing_at_all"}, "there is no test_nothing_at_all in tests"),
    ],
)
def test_an_entry_that_fits_no_more_is_named(wrong, why):
    assert faults(ENTRY) == []
    (fault,) = faults(replace(ENTRY, **wrong))
    assert fault.startswith("rng: no stream: ")
    assert why in fault


@pytest.mark.slow
def test_a_mutation_is_caught_or_survives():
    entries = [
        Mutation("labels: lost", "rewards/labels.py", "torch.sign(margins) + 1", "1 - torch.sign(margins)", "rewards"),
        Mutation("labels: words", "rewards/labels.py", "Turns scores", "Turns numbers", "rewards/test_preference.py"),
    ]
    code = f"from mutation_table import *; MUTATIONS[:] = {entries!r}; import mutations; sys.exit(mutations.main([]))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    first, caught, survived, total = done.stdout.strip().splitlines()
    assert first.startswith("without a mutation, all pass")
    assert caught.startswith("labels: lost: caught by tests/rewards/test_")
    assert survived.startswith("labels: words: SURVIVED")
    assert total.startswith("2 mutations, 1 survived")
