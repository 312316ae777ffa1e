"""Learning curves and the page about a run, and the runs that have neither."""

import html
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from watched_runs import PROMPTS, Recorder, build_module, loader

from xpo_lightning.callbacks import CompletionsTable, LearningCurves, RunReport, RunSummary, draw_curves
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.reporting.metrics_file import read_metrics
from xpo_lightning.reporting.panels import PANELS


class StopAt(Callback):
    """Raises at a training step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.slow
def test_every_panel_names_a_metric_that_is_logged(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(LearningCurves())
    trainer.fit(build_module(), loader(), loader())
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    for panel in PANELS:
        for name in panel.lines:
            assert len(metrics[name].values) == 4
            assert len(metrics[f"eval/{name}"].values) == 2
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    make_trainer(LearningCurves()).fit(build_module(), loader(), loader())
    assert [entry.name for entry in (tmp_path / "run").glob("curves*")] == ["curves.png"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopAsked(143)])
def test_curves_of_an_interrupted_run(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, error: BaseException
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        make_trainer(LearningCurves(), StopAt(3, error)).fit(build_module(), loader(), loader())
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from here on.
    assert (tmp_path / "run" / "curves.png").is_file()


def test_no_curves_of_a_failed_run(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(LearningCurves(), StopAt(3, RuntimeError("broken"))).fit(build_module(), loader(), loader())
    assert not (tmp_path / "run" / "curves.png").exists()


def test_curves_without_metrics(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(LearningCurves(), log_every_n_steps=50).fit(build_module(), loader())
    assert "trainer.log_every_n_steps" in capsys.readouterr().out
    assert not (tmp_path / "run" / "curves.png").exists()
    with pytest.raises(InputError, match=r"trainer\.log_every_n_steps"):
        draw_curves(tmp_path / "nowhere.csv", tmp_path / "curves.png")


@pytest.mark.parametrize("prefix", [None, "mine"])
def test_curves_need_a_readable_metrics_file(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, prefix: str | None
) -> None:
    logger = TensorBoardLogger(tmp_path) if prefix is None else CSVLogger(tmp_path, prefix=prefix)
    with pytest.raises(InputError, match=r"trainer\.logger"):
        make_trainer(LearningCurves(), logger=[logger]).fit(build_module(), loader())


def test_report_of_a_run_shows_what_it_left(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = [RunSummary(), CompletionsTable(terminal=False), RunReport(), recorder]
    make_trainer(*callbacks).fit(build_module(), loader(), loader())
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    errors = [recorder.metrics[place]["eval/win_rate_stderr"] for place in (0, -1)]
    wins = [recorder.metrics[place]["eval/win_rate"] for place in (0, -1)]
    assert f"{wins[0]:.3f} ± {errors[0]:.3f} →</span> <span>{wins[1]:.3f} ± {errors[1]:.3f}" in page
    assert page.count('<svg viewBox="0 0 380 220"') == 6
    for prompt in PROMPTS:
        assert f">{prompt}</p>" in page
    assert torch.__version__ in page
    with pytest.raises(InputError, match=r"trainer\.logger: RunReport needs"):
        make_trainer(RunReport(), logger=False).fit(build_module(), loader())
