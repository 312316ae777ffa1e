"""The tables and files of completions: those of validations and those of predictions."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from watched_runs import PROMPTS, Recorder, build_module, loader

from xpo_lightning.callbacks import CompletionsTable, PredictionsWriter
from xpo_lightning.callbacks import completions_table as completions_room
from xpo_lightning.core.batch import Experience
from xpo_lightning.core.errors import InputError

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def expected_rows(experience: Experience) -> list[dict[str, Any]]:
    """Say by hand what each pair's row is."""
    rows = []
    for i in range(len(experience)):
        policy, reference = experience.completions.by_policy, experience.completions.by_sampler
        row = {"prompt": experience.prompts.raw[i], "policy": policy.texts[i], "reference": reference.texts[i]}
        row["policy_score"] = experience.scores.by_policy[i].item()
        row["reference_score"] = experience.scores.by_sampler[i].item()
        row["label"] = experience.labels[i].item()
        row["policy_ended"], row["reference_ended"] = policy.ended[i].item(), reference.ended[i].item()
        rows.append(row)
    return rows


# ---- completions ----


def test_completions_file_holds_what_the_module_sampled(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    recorder = Recorder()
    make_trainer(CompletionsTable(rows=4, terminal=False), recorder).fit(build_module(), loader(), loader())
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    first, second = recorder.pairs[:2], recorder.pairs[2:]
    expected = [{"step": 2, **row} for pair in first for row in expected_rows(pair)][:4]
    expected += [{"step": 4, **row} for pair in second for row in expected_rows(pair)][:4]
    assert rows == expected
    assert [row["policy"] for row in rows[:4]] != [row["policy"] for row in rows[4:]], "the policy has changed"
    assert any(row["policy_ended"] != row["reference_ended"] for row in rows), "or the two could be swapped unseen"


@pytest.mark.parametrize(
    ("sanity", "every", "steps"), [(1, 1, [2, 4]), (-1, 1, [0, 2, 4]), (-1, 2, [0, 4]), (0, 2, [2])]
)
def test_completions_of_which_validations(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, sanity: int, every: int, steps: list[int]
) -> None:
    table = CompletionsTable(every, rows=1, terminal=False)
    make_trainer(table, num_sanity_val_steps=sanity).fit(build_module(), loader(), loader())
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")] == steps


def test_completions_of_a_second_run_are_appended(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(CompletionsTable(rows=1, terminal=False)).fit(build_module(), loader(), loader())
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")] == [2, 4, 2, 4]


def test_completions_in_the_terminal(
    make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    make_trainer(CompletionsTable(rows=2, file=False), recorder, max_epochs=1).fit(build_module(), loader(), loader())
    shown = capsys.readouterr().out
    rows = expected_rows(recorder.pairs[0])
    assert "step 2" in shown
    assert "the cat" in shown
    assert "a dog" in shown
    assert "red hat" not in shown
    for row in rows[:2]:
        assert f"{row['policy_score']:.2f}" in shown
        assert f"{row['reference_score']:.2f}" in shown
        assert {1.0: "policy", 0.0: "reference", 0.5: "tie"}[row["label"]] in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_terminal_shows_markup_and_control_characters_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": CHAT, "policy": "[bold]a[/bold]\x1b[31m\nb", "reference": "c", "label": 0.5}
    row |= {"policy_score": 1.0, "reference_score": 1.0, "policy_ended": True, "reference_ended": False}
    Console(width=200).print(completions_room._terminal_table([row], 7))
    shown = capsys.readouterr().out
    assert "[bold]a[/bold]�[31m⏎b " in shown
    assert "c … " in shown
    assert "assistant: sat" in shown
    assert "tie" in shown


def test_completions_go_to_the_loggers_that_take_tables(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class TableLogger(CSVLogger):
        tables: list[dict[str, Any]] = []  # noqa: RUF012

        def log_table(self, **table: Any) -> None:
            self.tables.append(table)

    loggers = [CSVLogger(tmp_path, name="a"), TableLogger(tmp_path, name="b"), TensorBoardLogger(tmp_path, name="c")]
    texts: list[tuple[Any, ...]] = []
    loggers[2].experiment.add_text = lambda *arguments: texts.append(arguments)
    table, recorder = CompletionsTable(rows=2, terminal=False, file=False), Recorder()
    make_trainer(table, recorder, logger=loggers, max_epochs=1).fit(build_module(), loader(), loader())
    (logged,) = TableLogger.tables
    expected = [list(row.values()) for row in expected_rows(recorder.pairs[0])[:2]]
    assert (logged["key"], logged["step"], logged["data"]) == ("eval/completions", 2, expected)
    assert logged["columns"][:3] == ["prompt", "policy", "reference"]
    ((tag, text, step),) = texts
    assert (tag, step) == ("eval/completions", 2)
    assert len(text.split("\n")) == 4
    assert not list(tmp_path.rglob("completions.jsonl"))


# ---- predictions ----


def test_predictions_hold_every_prompt(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    trainer = make_trainer(PredictionsWriter("out/predictions.jsonl"), recorder)
    batches = [{"prompt": PROMPTS[:4], "number": [0, 1, 2, 3]}, {"prompt": PROMPTS[4:], "number": [4, 5]}]
    trainer.predict(build_module(), torch.utils.data.DataLoader(batches, batch_size=None), return_predictions=False)
    pairs = recorder.pairs
    path = tmp_path / "run" / "out" / "predictions.jsonl"
    rows = read_jsonl(path)
    expected = [row for pair in pairs for row in expected_rows(pair)]
    for number, row in enumerate(expected):
        side = pairs[number // 4].completions
        row["policy_logp"] = side.by_policy.token_logps[number % 4].sum().item()
        row["reference_logp"] = side.by_sampler.token_logps[number % 4].sum().item()
        row["columns"] = {"number": number}
    assert rows == expected
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.jsonl"]
    assert str(path) in capsys.readouterr().out


def test_broken_prediction_leaves_the_old_file(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    path = tmp_path / "run" / "predictions.jsonl"

    def predict(prompts: list[str]) -> None:
        make_trainer(PredictionsWriter()).predict(build_module(), loader(prompts), return_predictions=False)

    predict(PROMPTS[:2])
    before = path.read_text()
    with pytest.raises(InputError):
        predict([*PROMPTS[:3], ""])
    assert path.read_text() == before
    assert len(read_jsonl(path.with_name("predictions.jsonl.partial"))) == 3
    predict(PROMPTS)
    assert len(read_jsonl(path)) == len(PROMPTS)


@pytest.mark.parametrize(("rank", "name"), [(0, "predictions.jsonl"), (2, "predictions.rank2.jsonl")])
def test_predictions_of_each_process_have_a_file(tmp_path: Path, rank: int, name: str) -> None:
    writer = PredictionsWriter()
    trainer: Any = SimpleNamespace(log_dir=None, default_root_dir=str(tmp_path), global_rank=rank)
    writer.setup(trainer, build_module(), "predict")
    assert writer.path == tmp_path / name
