"""Measured numbers with kept raw data are those of the raw data, and every measurement says when and of what it is."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from test_exploration_pages import assert_says, table

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
H200 = json.loads((RESULTS / "h200.json").read_text())
STEPS = {
    "SmolLM2-135M, ours": ("by free memory", "smollm2, ours, norms"),
    "TRL, best settings, batches of 64": ("of 16 pairs", "smollm2, TRL, best settings, batch 64"),
    "the same, LoRA": ("of 16 pairs", "smollm2, ours, LoRA"),
    "Llama-3.2-1B, ours": ("by free memory", "1b, ours, norms"),
}
AS_THEY_ARE = {"norms as they are": "by free memory", "micro-batches of 16 pairs, too": "of 16 pairs"}


def test_table_of_a_token_on_a_gpu():
    rows = table(PAGE, "| rows together | SmolLM2-135M")
    compared = 0
    for count, *cells in rows:
        for place, cell in enumerate(cells):
            model, way = ("smollm2", "1b")[place // 2], ("eager", "graphs")[place % 2]
            case = (model, int(count), way)
            found = [one for one in H200["decode"] if (one["model"], one["rows"], one["way"]) == case]
            assert bool(found) == (cell != "–"), "a number without raw data"
            if found:
                assert_says(cell, 1000 * found[0]["token_seconds"])
                compared += 1
    assert compared == 10


def test_table_of_a_step_on_a_gpu():
    model = ""
    rows = table(PAGE, "| seconds a step | whole")
    assert len(rows) == 8
    for name, whole, *phases, memory in rows:
        plain = name.replace("**", "")
        model = "1b" if plain.startswith("Llama") else "smollm2" if plain.startswith("SmolLM2") else model
        when, run = STEPS.get(plain) or (AS_THEY_ARE[plain], f"{model}, ours")
        (measured,) = [one for one in H200[f"time, micro-batches {when}"] if one["run"] == run]
        assert_says(whole.strip("*"), measured["step_seconds"])
        assert_says(memory, measured["gpu_peak_gib"])
        names = ("reference_rollout", "policy_rollout", "reward", "policy_forward", "backward")
        for cell, phase in zip(phases, names, strict=True):
            assert_says(cell, 128 * measured["phases_per_prompt"][phase])


def test_shares_of_tokens_that_a_replay_samples_alike():
    shares = [one["same_tokens"] for one in H200["decode"] if one["way"] == "graphs" and one["rows"] == 128]
    said = f"{shares[0]:.0%} of the sampled tokens were the same both ways for the first model and {shares[1]:.0%} for"
    assert said in " ".join(PAGE.read_text().split())


def test_seconds_a_step_on_a_busy_cpu():
    with (RESULTS / "thread_waiting.csv").open() as file:
        measured = list(csv.DictReader(file))

    def steps(series: str, waiting: str, others: str = "0") -> list[float]:
        chosen = [one for one in measured if (one["series"], one["waiting"]) == (series, waiting)]
        return [float(one["seconds_a_step"]) for one in chosen if one["other_processes"] == others]

    ways = ("default", "10000", "passive")
    for (_, *cells), way in zip(table(PAGE, "| threads | alone"), ways, strict=True):
        for cell, others in zip(cells, "01", strict=True):
            assert_says(cell, steps("1", way, others)[0])
    pairs = zip(steps("3", "50000"), steps("3", "default"), strict=True)
    ratios = [short / default for short, default in pairs]
    said = f"{math.prod(ratios) ** (1 / 5):.2f} times as long as the default over five runs that took turns"
    text = " ".join(PAGE.read_text().split())
    assert f"{said} (ratios of {min(ratios):.2f} to {max(ratios):.2f})" in text
    assert f"with 30,000 turns, a step took {steps('2', '30000', '1')[0]:.2f} s" in text


def test_every_measurement_has_a_date_a_commit_a_machine_a_command_and_says_where_its_data_is():
    rows = table(PAGE, "| section | date | commit")
    sections = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    named = re.findall(r"\(#([\w-]+)\)", " ".join(row[0] for row in rows))
    assert {name.replace("-", " ") for name in named} <= {section.lower() for section in sections}
    for _section, date, commit, machine, command, data in rows:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)
        assert re.fullmatch(r"`[0-9a-f]{7}`", commit)
        assert machine
        assert "`python -m benchmarks." in command
        assert data.startswith("not kept") or (ROOT / data.strip("`")).is_file()


@pytest.mark.parametrize(("row", "column"), [("win_rate", "eval/win_rate"), ("objective/kl", "eval/objective/kl")])
def test_numbers_of_the_readme_are_those_of_the_run_that_is_kept(row: str, column: str):
    with (RESULTS / "quickstart_metrics.csv").open(newline="") as file:
        held_out = [line for line in csv.DictReader(file) if line[column]]
    readme = (ROOT / "README.md").read_text()
    (cells,) = re.findall(rf"^\| `eval/{row}`[^|]*\| ([^|]+) \| ([^|]+) \|$", readme, re.MULTILINE)
    for cell, line in zip(cells, (held_out[0], held_out[-1]), strict=True):
        assert_says(cell, float(line[column]), float(line[f"{column}_stderr"]))
