"""The validation before training, and what is said of a run at its start and at its end."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from watched_runs import Recorder, build_module, loader, lora_module

from xpo_lightning import PromptDataModule
from xpo_lightning.callbacks import Baseline, CompletionsTable, LearningCurves, PolicyExport, RunSummary
from xpo_lightning.core.errors import InputError


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- baseline ----


@pytest.mark.slow
def test_baseline_is_the_validation_of_the_untrained_policy(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    (untrained,) = make_trainer(logger=False).validate(build_module(), loader(), verbose=False)
    trainer = make_trainer(Baseline(), num_sanity_val_steps=-1)
    trainer.fit(build_module(), loader(), loader())
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    baseline, first = rows[:2]
    assert {name: float(value) for name, value in baseline.items() if name.startswith("eval/")} == {
        name: value for name, value in untrained.items() if name != "step"
    }
    assert (baseline["step"], baseline["epoch"], baseline["loss/dpo"]) == ("0", "0", "")
    assert (first["eval/win_rate"], first["loss/dpo"] != "") == ("", True)
    assert len([row for row in rows if row["eval/win_rate"]]) == 3


def test_no_second_baseline_on_resume(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(saver, max_epochs=1).fit(build_module(), loader(), loader())
    trainer = make_trainer(Baseline(), num_sanity_val_steps=-1, logger=[CSVLogger(tmp_path, name=None, version="on")])
    trainer.fit(build_module(), loader(), loader(), ckpt_path=saver.last_model_path)
    rows = read_csv(tmp_path / "on" / "metrics.csv")
    assert [row["step"] for row in rows if row["eval/win_rate"]] == ["4"]


@pytest.mark.parametrize("steps", [0, 2])
def test_baseline_is_a_whole_validation_whatever_the_sanity_check_is(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, steps: int
) -> None:
    make_trainer(Baseline(), num_sanity_val_steps=steps, max_steps=1).fit(build_module(), loader(), loader())
    baseline = read_csv(tmp_path / "run" / "metrics.csv")[0]
    assert (baseline["step"], baseline["loss/dpo"], bool(baseline["eval/win_rate"])) == ("0", "", True)


def test_baseline_without_validation_prompts_is_refused(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.raises(InputError, match="validation prompts"):
        make_trainer(Baseline(), num_sanity_val_steps=-1).fit(build_module(), loader())


# ---- summary ----


def test_summary_names_what_there_is(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    callbacks = [RunSummary(), Baseline(), CompletionsTable(terminal=False), PolicyExport(), LearningCurves(), recorder]
    trainer = make_trainer(*callbacks, ModelCheckpoint(save_last=True), num_sanity_val_steps=-1)
    trainer.fit(build_module(), loader(), loader())
    ending = capsys.readouterr().out.partition("run folder")
    shown = dict(line.split("  ", 1) for line in "".join(ending[1:]).splitlines() if "  " in line)
    shown = {name: text.strip() for name, text in shown.items()}
    folder = tmp_path / "run"
    names = ["metrics.csv", "completions.jsonl", "policy", "curves.png", "checkpoints/last.ckpt"]
    assert shown["run folder"] == str(folder)
    assert {str(folder / name) for name in names} <= set(shown.values())
    assert "config" not in shown
    assert all(Path(text).exists() for name, text in shown.items() if not name.startswith("eval/"))
    first, last = recorder.metrics[0], recorder.metrics[-1]
    errors = [metrics["eval/win_rate_stderr"] for metrics in (first, last)]
    wins = [metrics["eval/win_rate"] for metrics in (first, last)]
    ends = (
        f"{wins[0]:.3f} ± {errors[0]:.3f} at step 0",
        f"{wins[1]:.3f} ± {errors[1]:.3f} at step {trainer.global_step}",
    )
    assert shown["eval/win_rate"] == " -> ".join(ends)
    kl, error = last["eval/objective/kl"], last["eval/objective/kl_stderr"]
    assert shown["eval/objective/kl"].endswith(f"-> {kl:.3f} ± {error:.3f} at step {trainer.global_step}")


def test_summary_of_a_run_that_was_validated_only_before_training_says_so(
    make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(RunSummary(), Baseline(), num_sanity_val_steps=-1, max_steps=1, val_check_interval=2)
    trainer.fit(build_module(), loader(), loader())
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eval/win_rate"))
    assert shown.endswith(" at step 0")
    assert "->" not in shown


def test_validation_of_a_checkpoint_is_labelled_with_its_step(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(ModelCheckpoint(tmp_path, save_last=True), max_steps=3).fit(build_module(), loader())
    table = CompletionsTable()
    trainer = make_trainer(RunSummary(), table)
    (metrics,) = trainer.validate(build_module(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    shown = capsys.readouterr().out
    assert metrics["step"] == 3
    assert "Held-out prompts at step 3" in shown
    win_rate, error = metrics["eval/win_rate"], metrics["eval/win_rate_stderr"]
    assert f"{win_rate:.3f} ± {error:.3f} at step 3" in shown
    assert "->" not in shown.partition("eval/win_rate")[2]


def test_summary_without_anything(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(RunSummary(), CompletionsTable(), logger=False).fit(build_module(), loader())
    assert capsys.readouterr().out.splitlines()[-1].split() == ["run", "folder", str(tmp_path)]


def test_summary_says_what_the_run_is_before_it_starts(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (1, 2, 3, 10)))
    data = PromptDataModule(str(prompts), validation_size=1, batch_size=2, max_prompts=3)
    module = lora_module()
    seen: list[str] = []

    class Look(Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            seen.append(capsys.readouterr().out)

    make_trainer(RunSummary(), Look(), max_epochs=1, num_sanity_val_steps=1).fit(module, datamodule=data)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in seen[0].splitlines() if "  " in line)
    trained = sum(weight.numel() for weight in module.trained_parameters())
    total = sum(weight.numel() for weight in module.policy.parameters())
    share = f"{trained:,} trained ({trained / total:.2%})"
    assert lines["policy"] == f"in memory: {total:,} weights in float32, {share}"
    assert lines["reference"] == "the policy with its adapters off"
    assert lines["reward"] == "PythonReward"
    assert re.fullmatch(
        r"3 prompts of [\d.]+ tokens on average, the longest \d+, of .*prompts.jsonl", lines["training"]
    )
    assert lines["validation"].startswith("1 prompts of ")
    assert lines["batch"] == "2 prompts, 4 completions of at most 5 tokens"
    assert lines["run"] == "1 epoch, in 32-true"
    assert re.match(r"[\d.]+ MiB of tensors in a step: models ", lines["memory"])
    noted = json.loads((tmp_path / "run" / "start.json").read_text())
    assert noted["run"] == lines
    assert noted["versions"]["torch"] == torch.__version__
