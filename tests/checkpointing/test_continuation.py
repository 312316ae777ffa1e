"""A run that is stopped and resumed in its folder leaves the files of one that was never stopped."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import completions_of, prompts_of
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from xpo_lightning.callbacks import Baseline, CompletionsTable, LearningCurves, RunContinuation, RunSummary
from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
from xpo_lightning.core.batch import Completions, Experience, Pair
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.owner import this_process

STEPS = 13  # with validations after 4, 8 and 12, none of which is a step that a run is resumed from
REPLACED = r"metrics\.csv of an earlier run is replaced"
FILES = ("metrics.csv", "completions.jsonl")


class Walk(pl.LightningModule):
    """Moves one weight, always in the same way, and logs where it is; nothing depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.weight - 1) ** 2 / 3
        late = {"late": self.weight.detach() / 7} if self.global_step >= 6 else {}
        self.log_dict({"loss/dpo": loss.detach(), "win_rate": 0.1, **late, "step": self.global_step + 1.0})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Experience:
        return experience_at(self.weight.item())

    def on_validation_epoch_end(self) -> None:
        kl = self.weight.detach() / 9
        self.log_dict({"eval/win_rate": 1 - kl, "eval/objective/kl": kl, "step": float(self.global_step)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def experience_at(weight: float) -> Experience:
    """Make two pairs whose texts say where the weight is."""

    def written(by: str) -> Completions:
        rows = completions_of([[1], [2, 3]])
        return Completions(
            rows.ids, rows.mask, rows.ended, tuple(f"{by} ☃ {weight} {n}" for n in "ab"), rows.token_logps
        )

    scores = Pair(torch.tensor([weight, 0.0]), torch.tensor([0.0, weight]))
    logps = Pair(torch.zeros(2), torch.zeros(2))
    sides = Pair(written("policy"), written("reference"))
    return Experience(prompts_of([[1], [2]]), sides, scores, torch.tensor([1.0, 0.0]), logps)


class StopBefore(Callback):
    """Breaks a run off before a batch."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class LogByItself(Callback):
    """Hands rows to the loggers, and leaves it to them when to write."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"own": trainer.global_step / 3}, trainer.global_step)


class SaveAtStart(Callback):
    """Saves a checkpoint before the first step."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(Path(trainer.log_dir) / "checkpoints" / "step=0.ckpt")  # type: ignore[arg-type]


@dataclass
class Runs:
    """Runs under one folder; a run is begun, broken off before `stop`, or resumed from a checkpoint."""

    root: Path

    def run(
        self,
        name: str,
        stop: int | None = None,
        resume: Path | None = None,
        continuation: bool = True,
        every_n_validations: int = 1,
        callbacks: tuple[Callback, ...] = (),
        saver: dict[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        folder = self.root / name
        saving = saver or {"every_n_train_steps": 3}
        own: list[Callback] = [
            StopBefore(stop),
            CompletionsTable(every_n_validations, terminal=False),
            RunSummary(),
            Baseline(),
            *([RunContinuation()] if continuation else []),
            ModelCheckpoint(folder / "checkpoints", filename="{step}", save_top_k=-1, **saving),
            *callbacks,
        ]
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
        checks = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1}
        logger = ResumableCSVLogger(self.root, name=None, version=name)
        options = {"log_every_n_steps": 1, "max_steps": STEPS, "logger": logger, **quiet, **checks, **options}
        trainer = pl.Trainer(callbacks=own, default_root_dir=folder, **options)
        try:
            trainer.fit(Walk(), loader(), loader(), ckpt_path=resume)
        except RuntimeError as error:
            assert str(error) == "killed"  # noqa: PT017
        return folder


def loader() -> torch.utils.data.DataLoader[int]:
    return torch.utils.data.DataLoader(range(100))  # type: ignore[arg-type]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """Give runs, without what Lightning says about small ones and about loaders that cannot be resumed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield Runs(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def steps_logged(folder: Path) -> list[str]:
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("step")
    return [row.split(",")[column] for row in rows]


# ---- runs ----


@pytest.mark.parametrize("every", [1, 2, pytest.param(3, marks=pytest.mark.slow)], ids="log_every_n_steps={}".format)
@pytest.mark.parametrize(("stop", "resume"), [(4, 3), (7, 6), (9, 6), (10, 9), (10, 3), (6, 3)])
def test_files_when_a_run_is_resumed_then_those_of_a_run_never_stopped(
    runs: Runs, every: int, stop: int, resume: int
) -> None:
    whole = contents(runs.run("whole", log_every_n_steps=every))
    folder = runs.run("stopped", stop=stop, log_every_n_steps=every)
    assert contents(folder)["metrics.csv"] != whole["metrics.csv"]
    runs.run("stopped", resume=folder / "checkpoints" / f"step={resume}.ckpt", log_every_n_steps=every)
    assert contents(folder) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", *sorted(FILES)]


def test_files_when_resumed_from_a_validation_then_those_of_a_run_never_stopped(runs: Runs) -> None:
    saver = {"every_n_epochs": 1}  # which means: after each validation
    whole = contents(runs.run("whole", saver=saver))
    folder = runs.run("stopped", stop=10, saver=saver)
    for step in (8, 4, 12):
        runs.run("stopped", resume=folder / "checkpoints" / f"step={step}.ckpt", saver=saver)
        assert contents(folder) == whole


def test_files_when_stopped_again_and_again_then_those_of_a_run_never_stopped(runs: Runs) -> None:
    whole = contents(runs.run("whole"))
    folder = runs.run("stopped", stop=4)
    runs.run("stopped", stop=5, resume=folder / "checkpoints" / "step=3.ckpt")
    runs.run("stopped", stop=8, resume=folder / "checkpoints" / "step=3.ckpt")
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt")
    assert contents(folder) == whole


def test_the_row_of_the_checkpoints_own_step_when_it_was_never_logged_then_the_resumed_run_has_it(runs: Runs) -> None:
    """As after a kill -9 right after the checkpoint was written: Lightning logs the row of the step after that."""
    whole = contents(runs.run("whole"))
    folder = runs.run("stopped", stop=6)
    lines = (folder / "metrics.csv").read_bytes().splitlines(keepends=True)
    (folder / "metrics.csv").write_bytes(b"".join(lines[:-1]))
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt")
    assert contents(folder) == whole


def test_a_half_written_row_when_resumed_then_it_goes(runs: Runs) -> None:
    whole = contents(runs.run("whole"))
    folder = runs.run("stopped", stop=8)
    with (folder / "metrics.csv").open("ab") as file:
        file.write(b"0.1")
    with (folder / "completions.jsonl").open("ab") as file:
        file.write('{"step": 8, "prompt": "☃'.encode()[:-1])
    part = folder / f".metrics.csv.{replace(this_process(), started=1)}.part"
    part.write_bytes(b"epoch,ev")
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt")
    assert contents(folder) == whole
    assert not part.exists()


def test_a_moved_folder_when_resumed_from_its_checkpoint_then_it_is_the_same_run(runs: Runs) -> None:
    whole = contents(runs.run("whole"))
    shutil.move(runs.run("stopped", stop=7), runs.root / "moved")
    runs.run("moved", resume=runs.root / "moved" / "checkpoints" / "step=6.ckpt")
    assert contents(runs.root / "moved") == whole


def test_a_run_that_is_resumed_in_another_folder_begins_files_of_its_own(runs: Runs) -> None:
    first = runs.run("first", stop=10)
    before = contents(first)
    second = runs.run("second", resume=first / "checkpoints" / "step=6.ckpt")
    assert contents(first) == before
    assert steps_logged(second) == ["7", "8", "8", "9", "10", "11", "12", "12", "13"]
    old = runs.run("third", stop=10)
    with pytest.warns(UserWarning, match=REPLACED):
        runs.run("third", resume=first / "checkpoints" / "step=6.ckpt")
    assert steps_logged(old) == ["7", "8", "8", "9", "10", "11", "12", "12", "13"], "not those of another run as well"


def test_a_run_that_is_begun_in_an_old_folder_replaces_the_metrics(runs: Runs) -> None:
    whole = runs.run("old")
    metrics = contents(whole)["metrics.csv"]
    with pytest.warns(UserWarning, match=REPLACED):
        runs.run("old")
    assert contents(whole)["metrics.csv"] == metrics


def test_a_checkpoint_without_counts_when_resumed_then_the_metrics_begin_anew(runs: Runs) -> None:
    folder = runs.run("run", stop=7, continuation=False)
    with pytest.warns(UserWarning, match=REPLACED):
        runs.run("run", resume=folder / "checkpoints" / "step=6.ckpt")
    assert steps_logged(folder) == ["7", "8", "8", "9", "10", "11", "12", "12", "13"]


def test_what_a_checkpoint_holds_is_plain(runs: Runs) -> None:
    folder = runs.run("run", stop=7)
    saved = torch.load(folder / "checkpoints" / "step=6.ckpt", weights_only=True)
    (entry,) = saved["xpo_metrics_files"]
    assert (entry["folder"], entry["rows"]) == (str(folder.resolve()), 7)  # the baseline, steps 1 to 5, a validation
    assert entry["row_to_come"][1] == 6
    assert all(type(value) is float for value in entry["row_to_come"][0].values())


def test_rows_that_a_logger_still_held_when_the_checkpoint_was_made_are_kept(runs: Runs) -> None:
    whole = contents(runs.run("whole", callbacks=(LogByItself(),)))
    folder = runs.run("stopped", stop=8, callbacks=(LogByItself(),))
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt", callbacks=(LogByItself(),))
    assert contents(folder) == whole


def test_a_validation_run_with_a_checkpoint_cuts_nothing(runs: Runs) -> None:
    folder = runs.run("run")
    before = contents(folder)["completions.jsonl"]
    table, logger = CompletionsTable(terminal=False), ResumableCSVLogger(runs.root, name=None, version="other")
    options: dict[str, Any] = {"logger": logger, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[table, RunContinuation()], accelerator="cpu", devices=1, **options)
    (runs.root / "other").mkdir()
    shutil.copy(folder / "completions.jsonl", runs.root / "other")
    shutil.copytree(folder / "checkpoints", runs.root / "other" / "checkpoints")
    checkpoint = runs.root / "other" / "checkpoints" / "step=6.ckpt"
    trainer.validate(Walk(), loader(), ckpt_path=checkpoint, verbose=False)
    after = (runs.root / "other" / "completions.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after) > len(before)


# ---- callbacks ----


def test_completions_of_every_other_validation_go_on_in_step(runs: Runs) -> None:
    whole = contents(runs.run("whole", every_n_validations=2))
    folder = runs.run("stopped", stop=10, every_n_validations=2)  # after three validations, the baseline included
    runs.run("stopped", resume=folder / "checkpoints" / "step=9.ckpt", every_n_validations=2)
    assert contents(folder) == whole


def test_tables_with_and_without_a_file_may_stand_side_by_side(runs: Runs) -> None:
    beside = (CompletionsTable(terminal=False, file=False),)
    folder = runs.run("stopped", stop=7, callbacks=beside)
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt", callbacks=beside)
    assert contents(folder) == contents(runs.run("whole"))


def test_summary_of_a_resumed_run_begins_where_the_run_began(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def changes() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if "->" in line]

    runs.run("whole")
    expected = changes()
    folder = runs.run("stopped", stop=7)
    assert changes() == []
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt")
    assert changes() == expected
    assert expected[0].startswith("eval/win_rate")
    assert "0.667 at step 0 ->" in expected[0]


def test_summary_of_a_resumed_run_names_its_completions(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.run("stopped", saver={"every_n_epochs": 1})
    capsys.readouterr()
    runs.run("stopped", resume=folder / "checkpoints" / "step=12.ckpt")  # no validation is left to do
    assert str(folder / "completions.jsonl") in capsys.readouterr().out


def test_a_run_resumed_from_step_0_has_one_baseline(runs: Runs) -> None:
    whole = contents(runs.run("whole"))
    folder = runs.run("stopped", stop=2, callbacks=(SaveAtStart(),))
    runs.run("stopped", resume=folder / "checkpoints" / "step=0.ckpt")
    assert contents(folder) == whole
    assert steps_logged(folder)[:2] == ["0", "1"]


def test_learning_curves_of_a_resumed_run_are_those_of_one_never_stopped(runs: Runs) -> None:
    whole = runs.run("whole", callbacks=(LearningCurves(),))
    folder = runs.run("stopped", stop=7, callbacks=(LearningCurves(),))
    assert not (folder / "curves.png").exists()
    runs.run("stopped", resume=folder / "checkpoints" / "step=6.ckpt", callbacks=(LearningCurves(),))
    assert (folder / "curves.png").read_bytes() == (whole / "curves.png").read_bytes()


# ---- the logger alone ----

ROWS: list[dict[str, Any]] = [
    {"loss": 0.1, "epoch": 0},
    {"loss": torch.tensor(1 / 3), "epoch": 0},
    {"eval/a, b": 2.5, "loss": float("nan")},
    {"loss": 1e-30, "alpha": 1},
    {"eval/a, b": 7.0},
]


def log(logger: CSVLogger, rows: list[dict[str, Any]], first: int = 0) -> None:
    for step, row in enumerate(rows, first):
        logger.log_metrics(row, step)
        logger.save()


def logger_in(folder: Path, **options: Any) -> ResumableCSVLogger:
    return ResumableCSVLogger(folder, name=None, version="run", **options)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.csv"


@pytest.fixture
def lightnings(tmp_path: Path) -> Callable[[int], bytes]:
    """Give a function that says what Lightning's logger makes of the first rows."""

    def written(count: int) -> bytes:
        log(CSVLogger(tmp_path, name="lightning", version=count), ROWS[:count])
        return (tmp_path / "lightning" / f"version_{count}" / "metrics.csv").read_bytes()

    return written


@pytest.mark.parametrize("count", range(1, 6))
def test_file_is_byte_for_byte_lightnings(
    tmp_path: Path, metrics: Path, lightnings: Callable[[int], bytes], count: int
) -> None:
    logger = logger_in(tmp_path)
    log(logger, ROWS[:count])
    assert metrics.read_bytes() == lightnings(count)
    assert logger.rows_written == count


@pytest.mark.parametrize("count", range(1, 6))
def test_cut_file_is_the_one_that_was_and_goes_on_as_the_one_that_will_be(
    tmp_path: Path, metrics: Path, lightnings: Callable[[int], bytes], count: int
) -> None:
    log(logger_in(tmp_path), ROWS)
    logger = logger_in(tmp_path)
    logger.keep_rows(count)
    assert metrics.read_bytes() == lightnings(count)
    assert logger.rows_written == count
    log(logger, ROWS[count:], first=count)
    assert metrics.read_bytes() == lightnings(5)
    assert logger.rows_written == 5


def test_file_that_keeps_no_row_is_gone_until_the_next(
    tmp_path: Path, metrics: Path, lightnings: Callable[[int], bytes]
) -> None:
    log(logger_in(tmp_path), ROWS)
    logger = logger_in(tmp_path)
    logger.keep_rows(0)
    assert list(metrics.parent.iterdir()) == []
    log(logger, ROWS[:2])
    assert metrics.read_bytes() == lightnings(2)


def test_rows_that_come_together_are_all_written(
    tmp_path: Path, metrics: Path, lightnings: Callable[[int], bytes]
) -> None:
    logger = logger_in(tmp_path)
    for step, row in enumerate(ROWS):
        logger.log_metrics(row, step)
    assert logger.rows_written == 0
    logger.save()
    logger.save()
    assert logger.rows_written == 5
    assert metrics.read_bytes() == lightnings(5)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_kill_while_the_columns_change_loses_no_row(
    tmp_path: Path,
    metrics: Path,
    lightnings: Callable[[int], bytes],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
) -> None:
    def killed(*_: Any) -> None:
        raise kind("killed")

    logger = logger_in(tmp_path)
    log(logger, ROWS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(InputError if kind is OSError else kind, match="killed"):
            log(logger, ROWS[2:3], first=2)
    assert metrics.read_bytes() == lightnings(2)
    assert logger.rows_written == 2
    log(logger, ROWS[3:], first=3)  # the same process goes on: with the row that failed
    assert metrics.read_bytes() == lightnings(5)
    other = logger_in(tmp_path)
    other.keep_rows(2)
    assert metrics.read_bytes() == lightnings(2)


def test_file_of_another_run_stays_until_this_one_begins(tmp_path: Path, metrics: Path) -> None:
    log(logger_in(tmp_path), ROWS)
    logger = logger_in(tmp_path)
    before = metrics.read_bytes()
    logger.save()
    logger.log_hyperparams({"a": 1})
    assert metrics.read_bytes() == before
    with pytest.warns(UserWarning, match=REPLACED):
        logger.begin()
    assert not metrics.exists()
    log(logger, ROWS[:1])
    logger.begin()
    assert logger.rows_written == 1
    assert metrics.exists()


def test_rows_that_are_lost_are_told(tmp_path: Path, metrics: Path, lightnings: Callable[[int], bytes]) -> None:
    log(logger_in(tmp_path), ROWS[:2])
    logger = logger_in(tmp_path)
    with pytest.warns(UserWarning, match=r"metrics\.csv has lost 3 rows"):
        logger.keep_rows(5)
    assert metrics.read_bytes() == lightnings(2)


def test_folder_that_is_not_local_is_refused() -> None:
    with pytest.raises(InputError, match=r"^trainer\.logger: .*'memory://logs/run' is none; use lightning\.pytorch"):
        _ = ResumableCSVLogger("memory://logs", name=None, version="run").experiment
