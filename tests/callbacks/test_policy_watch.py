"""`PolicyWatch`: what it calls repetition, when it warns, and that it can end a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from watched_runs import build_module, loader

from xpo_lightning import Completions, InputError
from xpo_lightning.callbacks import PolicyWatch
from xpo_lightning.callbacks.policy_watch import repetition


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def run(watch: PolicyWatch, **options: Any) -> pl.Trainer:
        logger = CSVLogger(tmp_path, name=None, version="run")
        options = {"max_steps": 4, "log_every_n_steps": 1, "logger": logger, "enable_checkpointing": False, **options}
        trainer = pl.Trainer(accelerator="cpu", callbacks=[watch], enable_progress_bar=False, **options)
        trainer.fit(build_module(), loader())
        return trainer

    return run


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def completions(*rows: list[int]) -> Completions:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ended = torch.ones(len(rows), dtype=torch.bool)
    return Completions(ids, mask, ended, ("",) * len(rows), torch.zeros(ids.shape))


def test_repetition_worked_by_hand():
    """1 2 1 2 1 2 1: 1212, 2121, 1212, 2121, two of four repeat. 3 4 5 6 7: two of two are new. 8 9: too short.

    Zeros as real tokens are no padding: 0 0 0 0 0 0 repeats twice in three.
    """
    assert repetition(completions([1, 2, 1, 2, 1, 2, 1], [3, 4, 5, 6, 7], [8, 9])) == pytest.approx(2 / 6)
    assert repetition(completions([0, 0, 0, 0, 0, 0])) == pytest.approx(2 / 3)
    assert repetition(completions([1, 2, 3], [4])) == 0
    assert repetition(completions([1])) == 0


def test_repetition_is_that_of_a_naive_count():
    torch.manual_seed(0)
    rows = [torch.randint(100_000, 100_003, (int(length),)).tolist() for length in torch.randint(1, 40, (20,))]
    repeats = total = 0
    for row in rows:
        seen: set[tuple[int, ...]] = set()
        for start in range(len(row) - 3):
            ngram = tuple(row[start : start + 4])
            repeats, total = repeats + (ngram in seen), total + 1
            seen.add(ngram)
    assert 0 < repeats < total
    assert repetition(completions(*rows)) == pytest.approx(repeats / total)


def test_each_limit_warns_once_and_is_recorded(
    fit: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(PolicyWatch(max_kl=1e-9, max_length_ratio=1.0, max_repetition=0.0, window=2))
    found = {event["text"].rpartition("PolicyWatch.")[2].split(":")[0]: event["step"] for event in events(tmp_path)}
    assert {"max_kl", "max_length_ratio"} <= found.keys()
    assert len(found) == len(events(tmp_path))
    assert min(found.values()) >= 2
    assert f"Step {found['max_kl']}: Warning: the KL from the reference is" in capsys.readouterr().out


def test_nothing_is_said_within_the_limits_or_without_them(fit: Callable[..., pl.Trainer], tmp_path: Path):
    fit(PolicyWatch(window=1, max_length_ratio=1000))
    fit(PolicyWatch(max_kl=None, max_length_ratio=None, max_repetition=None, window=1))
    assert events(tmp_path) == []


def test_a_run_above_the_kl_that_stops_it_ends_as_if_it_were_done(
    fit: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = fit(PolicyWatch(stop_at_kl=1e-9, window=1), max_steps=20)
    assert 0 < trainer.global_step < 20
    assert events(tmp_path)[-1]["text"].startswith("Stopped: the KL from the reference")
    assert "is above 1e-09" in capsys.readouterr().out


def test_limits_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"PolicyWatch\.max_length_ratio"):
        PolicyWatch(max_length_ratio=0.5)
    with pytest.raises(InputError, match=r"PolicyWatch\.window"):
        PolicyWatch(window=0)
