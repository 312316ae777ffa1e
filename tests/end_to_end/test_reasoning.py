"""The recipe with verified answers: it trains, its held-out problems are others, and right answers are counted."""

import csv
from pathlib import Path

import pytest
import yaml
from test_configs import CONFIGS

from xpo_lightning import PromptDataModule
from xpo_lightning.cli.lightning_cli import main

DATA = yaml.safe_load((CONFIGS / "reasoning.yaml").read_text())["data"]
TINY = ["--model.policy.path", "package:xpo_lightning/embedded/policy", "--model.policy.dtype", "float32"]
SMALL = ["--trainer.max_steps", "2", "--data.batch_size", "4", "--data.max_validation_prompts", "4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(CONFIGS.parent / "benchmarks")
    import reasoning

    return reasoning


def test_recipe_takes_two_steps_with_a_tiny_model(tmp_path: Path):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    main(["fit", "--config", "reasoning", *TINY, *SMALL, "--trainer.default_root_dir", str(tmp_path)])
    with (tmp_path / "version_0" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["loss/total"]]
    assert len(rows) == 2
    for row in rows:  # The tiny model tells stories, so that no pair has a preference term, but each has the bonus.
        assert (float(row["objective/model_scores"]), float(row["pairs/silent"]), float(row["loss/dpo"])) == (0, 1, 0)
        assert float(row["loss/total"]) == float(row["loss/xpo"]) < 0


def test_held_out_problems_are_not_the_training_problems():
    """Row i of seed s is made from s + i, so that seeds 0 and 1 would share all problems but one."""
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    data = PromptDataModule(DATA["source"], validation_source=DATA["validation_source"])
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    train, held_out = ([prompt for batch in loader for prompt in batch["prompt"]] for loader in loaders)
    assert len(train) == 16 * DATA["batch_size"], "one epoch is the 16 steps of the header"
    assert len(set(held_out) - set(train)) >= 256


def test_right_answers_are_counted_by_hand(script):
    rows = [
        {"prompt": "a", "policy": " 12", "policy_score": 1.0, "reference": " It is 12.", "reference_score": 1.0},
        {"prompt": "b", "policy": " -3", "policy_score": 1.0, "reference": " 3", "reference_score": 0.0},
        {"prompt": "c", "policy": " 40", "policy_score": 0.0, "reference": " 4 or 5", "reference_score": 0.0},
        {"prompt": "c", "policy": " 4", "policy_score": 0.0, "reference": " 4 or 5", "reference_score": 0.0},
        {"prompt": "seen", "policy": " 7", "policy_score": 1.0, "reference": " 7", "reference_score": 1.0},
    ]
    for row, answer in zip(rows, ("12", "-3", "4", "4", "7"), strict=True):
        row["columns"] = {"answer": answer}
    assert script.summarize(rows, {"seen"}) == {
        "problems": 3,
        "reward": {"before": 1, "after": 2, "gained": 1, "lost": 0},
        "bare": {"before": 0, "after": 2, "gained": 2, "lost": 0},
        "anywhere": {"before": 2, "after": 2, "gained": 1, "lost": 1},
    }
