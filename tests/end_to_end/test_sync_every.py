"""A policy that is behind when it writes: the engine of the comparison, and its numbers worked by hand."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder, fit_quietly

from benchmarks.quality import sync_every
from benchmarks.quality.earlier_policy import EarlierPolicy
from xpo_lightning import PolicySampler

ROOT = Path(__file__).parents[2]
PROMPTS = ["the cat", "a dog ran away from the hat and", "red", "on the mat today"] * 3


def test_without_delay_the_engine_writes_what_the_run_itself_would(make_module) -> None:
    plain, engine = (make_module(rollout=rollout, learning_rate=1e-2) for rollout in (None, EarlierPolicy()))
    seen = [Recorder(), Recorder()]
    for module, recorder in zip((plain, engine), seen, strict=True):
        fit_quietly(module, PROMPTS, batch_size=4, callbacks=[recorder])
    for name in ("loss/total", "completions/model_length", "objective/kl"):
        assert seen[0].of(name) == pytest.approx(seen[1].of(name), rel=1e-5, abs=1e-6)
    for one, other in zip(plain.policy.parameters(), engine.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_with_a_delay_the_first_policy_writes_the_first_batches(make_module) -> None:
    """The KL of completions by the untrained policy from the reference is that of rounding."""
    module = make_module(rollout=EarlierPolicy(sync_every=2), learning_rate=1e-2)
    fit_quietly(module, PROMPTS, batch_size=4, callbacks=[seen := Recorder()])
    first, second, third = seen.of("objective/kl")
    assert abs(first) < 1e-4
    assert abs(second) < 1e-4
    assert abs(third) > 1e-3
    assert seen.of("rollout/staleness") == [0, 1, 0]


@pytest.mark.parametrize(
    ("every", "options", "warns"),
    [
        (10, {"bonus_on": "both"}, True),
        (10, {"bonus_on": "both", "alpha": 0.0}, False),
        (10, {}, True),
        (10, {"sampler": None}, False),
        (1, {"bonus_on": "both"}, False),
    ],
    ids=["both", "no bonus", "the policy as sampler", "the reference as sampler", "no delay"],
)
def test_bonus_on_what_an_earlier_policy_wrote_is_warned_of(make_module, every: int, options: Any, warns: bool) -> None:
    module = make_module(
        rollout=EarlierPolicy(sync_every=every), **{"alpha": 1e-5, "sampler": PolicySampler(), **options}
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit_quietly(module, PROMPTS, batch_size=4, max_steps=1)
    assert any("of an earlier one then" in str(each.message) for each in seen) is warns


def test_differences_are_those_of_one_seed() -> None:
    """0.8 - 0.7 and 0.6 - 0.7: the mean is 0, the standard deviation 0.1414, the standard error 0.1."""
    wins = {(1, 1): 0.7, (1, 2): 0.7, (10, 1): 0.8, (10, 2): 0.6}
    rows = [{"sync_every": every, "seed": seed, "win_rate": win, "kl": 1.0} for (every, seed), win in wins.items()]
    assert sync_every.differences(rows, 10, 1, "win_rate") == pytest.approx([0.1, -0.1])
    assert sync_every.table(rows).splitlines()[2:] == [
        "| 1 | 2 | 0.700 ± 0.000 | 1.000 ± 0.000 |  |",
        "| 10 | 2 | 0.700 ± 0.100 | 1.000 ± 0.000 | 0.000 ± 0.100 |",
    ]


def test_table_of_the_page_is_that_of_the_kept_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "sync_every.json").read_text())
    assert {row["steps"] for row in rows} == {60}
    assert sync_every.table(rows) in (ROOT / "docs" / "vllm.md").read_text()


@pytest.mark.slow
def test_command_makes_its_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.batch_size", "4"]
    small += ["--data.max_validation_prompts", "4", "--defaults.baseline", "false"]
    words = ["sync_every", "--every", "1", "2", "--seeds", "1", "--out", str(tmp_path), "--", *small]
    monkeypatch.setattr(sys, "argv", words)
    sync_every.main()
    said = capsys.readouterr().out
    assert "| 2 | 1 |" in said
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.csv")}
    assert len(made) == 2
    sync_every.main()
    assert capsys.readouterr().out == said
    assert made == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.csv")}
