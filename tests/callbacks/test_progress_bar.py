"""The progress bar: what it shows is what was measured."""

import io
import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from watched_runs import build_module, loader

from xpo_lightning.callbacks import Throughput, XPOProgressBar
from xpo_lightning.callbacks import progress_bar as progress_room


def test_progress_bar_shows_short_names(make_trainer: Callable[..., pl.Trainer]) -> None:
    bar = XPOProgressBar(refresh_rate=7, leave=True)
    trainer, module = make_trainer(bar, enable_progress_bar=True), build_module()
    trainer.fit(module, loader(), loader())
    shown, metrics = bar.get_metrics(trainer, module), trainer.callback_metrics
    assert list(shown) == ["win", "margin", "kl", "loss", "eval win", "tok/s", "left"]
    names = ["win_rate", "objective/scores_margin", "objective/kl", "loss/total", "eval/win_rate"]
    assert list(shown.values())[:5] == [metrics[name].item() for name in names]
    assert shown["left"] == "0:00:00"
    assert (bar.refresh_rate, bar._leave) == (7, True)
    assert trainer.progress_bar_callback is bar


class Clock:
    """Tells the time that it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Passing(Callback):
    """Lets 2 seconds pass in each step, and 6 in a validation; keeps what the bar shows after each step."""

    def __init__(self, clock: Clock, bar: XPOProgressBar) -> None:
        self.clock, self.bar = clock, bar
        self.shown: list[dict[str, Any]] = []
        self.tokens: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.clock.now += 2
        self.tokens.append(3 * float(metrics["completions/model_length"] + metrics["completions/ref_length"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.clock.now += 6
        self.shown.append(self.bar.get_metrics(trainer, pl_module))


@pytest.mark.parametrize("epochs", [2, 3])
def test_progress_bar_tells_the_speed_and_the_time_left(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """After 2 steps and a validation, 10 seconds, 2 or 4 steps are left: 10 or 20 seconds. Steps are of 3 pairs."""
    clock, bar = Clock(), XPOProgressBar()
    passing = Passing(clock, bar)
    monkeypatch.setattr(progress_room, "time", clock)
    trainer = make_trainer(passing, bar, enable_progress_bar=True, max_epochs=epochs)
    trainer.fit(build_module(), loader(), loader())
    assert (
        [shown["left"] for shown in passing.shown] == ["0:00:10", "0:00:00"]
        if epochs == 2
        else [
            "0:00:20",
            "0:00:10",
            "0:00:00",
        ]
    )
    first, second = passing.tokens[:2]
    assert passing.shown[0]["tok/s"] == f"{(0.9 * first + second) / (0.9 * 2 + 2):,.0f}"


def test_progress_bar_shows_the_speed_that_throughput_logs(make_trainer: Callable[..., pl.Trainer]) -> None:
    bar = XPOProgressBar()
    trainer, module = make_trainer(Throughput(), bar, enable_progress_bar=True), build_module()
    trainer.fit(module, loader(), loader())
    logged = float(trainer.callback_metrics["throughput/tokens_per_second"])
    assert bar.get_metrics(trainer, module)["tok/s"] == f"{logged:,.0f}"


@pytest.mark.parametrize(("epochs", "text"), [(-1, "Epoch 3   "), (4, "Epoch 3/3 ")])
def test_progress_bar_names_the_epoch(make_trainer: Callable[..., pl.Trainer], epochs: int, text: str) -> None:
    bar = XPOProgressBar()
    bar._trainer = make_trainer(bar, enable_progress_bar=True, max_epochs=epochs, max_steps=5)
    assert bar._get_train_description(3) == text


def test_progress_bar_fits_a_terminal_of_80_columns(make_trainer: Callable[..., pl.Trainer]) -> None:
    shown = io.StringIO()
    bar = XPOProgressBar(leave=True, console_kwargs={"width": 80, "force_terminal": True, "file": shown})
    trainer = make_trainer(bar, Throughput(), enable_progress_bar=True, max_epochs=1)
    trainer.fit(build_module(), loader(), loader())
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-ln-z]", "\n", re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()))
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text)]
    assert max(map(len, lines)) <= 80
    assert any(all(name in line for name in ("Epoch", " win: ", "kl: ", "left: ", "eval win: ")) for line in lines), (
        lines
    )
    assert not any(line.startswith(("margin:", "tok/s:", "left:")) for line in lines)  # nothing was wrapped


def test_progress_bar_renders(make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(XPOProgressBar(), enable_progress_bar=True, max_epochs=1).fit(build_module(), loader(), loader())
    shown = capsys.readouterr().out
    assert "win: " in shown
    assert "eval win: " in shown
    assert "v_num" not in shown
