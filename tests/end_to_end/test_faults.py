"""One process of several fails or is killed: all end within a minute, with one line, and the resumed run ends the same.

`python tests/faults.py` tries every fault at every place; these are a few of them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[1].joinpath("faults.py")
SAMPLE = [
    "fsdp, full, nan in process 1, step: loss",
    "fsdp, full, memory in process 0, step: in the backward",
    "ddp, full, memory in process 1, step: in the backward",
    "ddp, full, nan in process 1, step: loss",
    "ddp, full, exception in process 1, validation: objective",
    "ddp, full, kill in process 0, predict: the policy writes",
]


def verdicts(*arguments: str) -> dict[str, str]:
    """Run the script, which forks: it has to be a process of its own, one that has not computed yet."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(.*): (right|WRONG) \([\d.]+ s\)$", done.stdout, re.MULTILINE))
    assert found, done.stdout + done.stderr
    assert set(found.values()) == {"right"}, done.stdout
    return found


def test_a_fault_of_one_process_ends_both_with_its_line():
    assert verdicts("--only", *SAMPLE).keys() == set(SAMPLE)


def test_a_killed_process_of_four_ends_all():
    name = "ddp, full, kill in process 2, step: in the backward"
    assert verdicts("--processes", "4", "--ranks", "2", "--only", name).keys() == {name}
