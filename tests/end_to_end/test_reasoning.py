"""The recipe with verified answers: it trains, its held-out problems are others, and right answers are counted."""

import csv
from pathlib import Path

import pytest
import yaml
from conftest import BARE
from test_configs import CONFIGS

from benchmarks.quality import reasoning
from xpo_lightning import PromptDataModule, VerifierReward
from xpo_lightning.cli.lightning_cli import main

DATA = yaml.safe_load((CONFIGS / "reasoning.yaml").read_text())["data"]
TINY = ["--model.policy.path", "package:xpo_lightning/embedded/policy", "--model.policy.dtype", "float32"]
SMALL = ["--trainer.max_steps", "2", "--data.batch_size", "4", "--trainer.limit_val_batches", "0"]
SMALL += [f"--defaults.{name}={str(wanted).lower()}" for name, wanted in BARE.items()]


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
    """Row i of seed s is made from s + i, so that seeds 0 and 1 would share all rows but one."""
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    data = PromptDataModule(DATA["source"], validation_source=DATA["validation_source"])
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    train, validation = ([prompt for batch in loader for prompt in batch["prompt"]] for loader in loaders)
    assert len(train) == 16 * DATA["batch_size"], "one epoch is the 16 steps of the header"
    unseen = [row["prompt"] for row in reasoning.held_out(DATA)]
    assert sorted(unseen) == sorted(set(validation) - set(train))
    assert len(unseen) >= 256


def test_right_answers_are_counted_by_hand():
    """A bare number, one in a sentence, another number, and no number; the reward takes the last number of a text."""
    problems = [{"prompt": "?", "answer": answer} for answer in ("12", "-3", "4", "7")]
    reward = VerifierReward("math")
    before = reasoning.verdicts(reward, problems, [" It is 12", " 3", " 4 or 5", ""])
    after = reasoning.verdicts(reward, problems, [" 12", " -3", " 40", " seven"])
    assert before["bare"] == [False, False, False, False]
    assert before["anywhere"] == [True, False, True, False]
    assert (before["reward"], after["reward"]) == ([True, False, False, False], [True, True, False, False])
    assert after["bare"] == after["anywhere"] == [True, True, False, False]
    assert reasoning.compare(before["anywhere"], after["anywhere"]) == {"before": 2, "after": 2, "gained": 1, "lost": 1}
    assert reasoning.compare(before["reward"], after["reward"]) == {"before": 1, "after": 2, "gained": 1, "lost": 0}


def test_answers_end_at_the_first_stop_string():
    assert [reasoning.cut(text, [".", "\n"]) for text in (" 12. So", " 12\n.", " 12")] == [" 12", " 12", " 12"]
