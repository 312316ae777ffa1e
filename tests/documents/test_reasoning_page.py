"""The page on verified answers: its numbers are those of the record, and what it calls a rise is one."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_exploration_pages import assert_says, table

ROOT = Path(__file__).parents[2]
PAGE, RECORD = ROOT / "docs" / "reasoning.md", ROOT / "benchmarks" / "results" / "reasoning.json"
RESULTS = json.loads(RECORD.read_text())
TEXT = " ".join(PAGE.read_text().split())


def share(count: int, number: int) -> tuple[float, float]:
    """Return a share and its standard error."""
    part = count / number
    return part, math.sqrt(part * (1 - part) / number)


def rise(counts: dict[str, int], number: int) -> tuple[float, float]:
    """Return the rise of a share on the same problems, and its standard error: each problem gains 1, 0 or -1."""
    mean = (counts["gained"] - counts["lost"]) / number
    return mean, math.sqrt(((counts["gained"] + counts["lost"]) / number - mean**2) / number)


def test_standard_errors_by_hand():
    """25 of 100: sqrt(0.25 x 0.75 / 100) = 0.0433. 30 gained and 10 lost of 100: sqrt((0.4 - 0.04) / 100) = 0.06."""
    assert share(25, 100) == (0.25, pytest.approx(0.0433, abs=5e-5))
    assert rise({"gained": 30, "lost": 10}, 100) == (0.2, pytest.approx(0.06))


def measured() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the counts by way of answering and seed."""
    ways = ("sampled", "greedy")
    return {(way, str(run["seed"])): run[way] for run in RESULTS["runs"] for way in ways if way in run}


def test_table_is_that_of_the_record():
    rows = table(PAGE, "| answers | seed")
    assert {(way, seed) for way, seed, *_ in rows} == measured().keys()
    for way, seed, *cells in rows:
        counts, number = measured()[way, seed], RESULTS["problems"]
        wanted = [
            values
            for name in ("reward", "anywhere")
            for values in (
                *(share(counts[name][when], number) for when in ("before", "after")),
                rise(counts[name], number),
            )
        ]
        for cell, (value, error) in zip(cells, wanted, strict=True):
            assert re.fullmatch(r"-?0\.\d{3} ± 0\.\d{3}", cell)
            assert_says(cell, value, error)


def test_sampled_answers_are_right_more_often_in_each_seed_by_three_standard_errors():
    for run in RESULTS["runs"]:
        gain, error = rise(run["sampled"]["reward"], RESULTS["problems"])
        assert gain > 3 * error, run["seed"]
    assert len(RESULTS["runs"]) == 3


def test_page_says_when_of_what_and_on_what():
    for name in ("date", "commit", "command", "machine"):
        assert RESULTS[name] in TEXT, name
    assert RESULTS["problems"] >= 256
    assert f"the {RESULTS['problems']} problems" in TEXT
    seconds = ", ".join(str(run["processor_seconds"]) for run in RESULTS["runs"])
    assert f"{seconds} seconds of one core" in TEXT


def test_part_of_the_rise_that_is_format():
    before = [run["sampled"][name]["before"] for run in RESULTS["runs"] for name in ("anywhere", "reward")]
    others = before[0] - before[1]
    assert before == before[:2] * 3, "all runs begin with one model"
    assert f"in {others} of the {RESULTS['problems']} problems, the first model writes the right number" in TEXT
    for run in RESULTS["runs"]:
        assert run["sampled"]["anywhere"]["after"] == run["sampled"]["reward"]["after"]
        gain, error = rise(run["sampled"]["anywhere"], RESULTS["problems"])
        assert gain > 3 * error, run["seed"]
