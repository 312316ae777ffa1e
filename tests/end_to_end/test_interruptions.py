"""Runs that are killed or stopped by signals, and resumed by the same command, end as if they had never been."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1].joinpath("interruptions.py")


def output_of(*arguments: str) -> list[str]:
    """Run the script, which forks: it has to be a process of its own, one that has not computed yet."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()


def test_killed_runs_of_two_processes_end_the_same():
    assert output_of("--kills", "5", "--processes", "2")[-1] == "5 kills, 2 process(es): the same end"


def test_killed_runs_that_save_folders_end_the_same():
    assert output_of("--kills", "5", "--folders")[-1] == "5 kills, 1 process(es): the same end"


def test_runs_that_are_killed_or_stopped_by_signals_end_the_same():
    *_, kills, report = output_of("--kills", "5", "--signals")
    assert kills == "5 kills, 1 process(es): the same end"
    found: dict[str, Any] = json.loads(report)
    whole = found.pop("whole")
    assert len(found) == 9
    for name, run in found.items():
        assert run["digest"] == whole, name
        if name.startswith("SIGTERM"):
            assert (run["status"], run["saved"]) == (143, True), name
            assert "SIGTERM: stopping as soon as nothing is lost" in run["printed"]
            assert "--ckpt_path last goes on from" in run["printed"]
    assert (found["Ctrl-C once"]["status"], found["Ctrl-C once"]["saved"]) == (130, True)
    assert "press Ctrl-C again to leave at once" in found["Ctrl-C once"]["printed"]
    assert (found["Ctrl-C twice"]["status"], found["Ctrl-C twice"]["saved"]) == (130, False)
