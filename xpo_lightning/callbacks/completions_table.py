"""`CompletionsTable`: shows completions of the policy and the reference side by side after each validation."""

import os
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text

from xpo_lightning.callbacks.base import FileWriter, counts_as_validation, folder_id, goes_on_in, is_fast_dev_run
from xpo_lightning.callbacks.pair_rows import Row, append_rows, pair_rows, prompt_text
from xpo_lightning.core.atomic_files import appending, explaining_write_errors
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.printable import printable
from xpo_lightning.reporting.run_files import COMPLETIONS

TABLE_NAME = "eval/completions"
PROMPT_TAIL, COMPLETION_HEAD = 120, 400


class CompletionsTable(FileWriter):
    """Shows the first held-out prompts with both completions and their scores after each validation.

    The file is `completions.jsonl` in the run's folder, with one line per prompt and validation. The callback only
    appends to it; a run that is resumed in its folder first drops the lines after its checkpoint. `step` counts
    optimizer steps.

    Args:
        every_n_validations: Show the first validation and every n-th after it. The sanity check counts as one if it
            uses all validation data (`trainer.num_sanity_val_steps: -1`).
        rows: Prompts to show.
        terminal: Print a table.
        file: Append to `completions.jsonl`.
        logger: Send a table to each logger that supports tables: Weights & Biases and TensorBoard do.
    """

    def __init__(
        self, every_n_validations: int = 1, rows: int = 8, terminal: bool = True, file: bool = True, logger: bool = True
    ) -> None:
        super().__init__()
        for name, value in {"every_n_validations": every_n_validations, "rows": rows}.items():
            check_range(f"trainer.callbacks: CompletionsTable.{name}", value, least=1)
        if not (terminal or file or logger):
            raise InputError(
                "trainer.callbacks: CompletionsTable has terminal, file and logger all off; switch one on, or remove it"
            )
        self.every_n_validations, self.rows = every_n_validations, rows
        self.terminal, self.file, self.logger = terminal, file, logger
        self._validations = 0
        self._due = False
        self._shown: list[Row] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the validations of an earlier run."""
        super().setup(trainer, pl_module, stage)
        self._validations = 0

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; it tells a table that writes the file from one that does not."""
        return self._generate_state_key(file=self.file)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, and the file's folder and size."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return {"validations": self._validations, "folder": folder_id(self.folder), "bytes": size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the state in a resumed training run; validation and prediction are runs of their own."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validations = state["validations"]
        if self.file and trainer.is_global_zero and goes_on_in(self.folder, state["folder"], trainer):
            _cut(self._path, state["bytes"])
            if self._path.exists():
                self.written["completions"] = self._path

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is shown."""
        self._shown, self._due = [], False
        if counts_as_validation(trainer):
            self._due = trainer.is_global_zero and self._validations % self.every_n_validations == 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the pairs of the first prompts."""
        missing = self.rows - len(self._shown)
        if self._due and missing > 0:
            sampled = outputs.sampled
            if sampled is not None:
                self._shown += pair_rows(sampled.select(range(min(missing, len(sampled)))))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the kept pairs."""
        if counts_as_validation(trainer):
            self._validations += 1  # Not before: a resumed run repeats an interrupted validation.
        if not self._shown:
            return
        step = getattr(pl_module, "steps_taken", trainer.global_step)
        if self.terminal:
            rich.get_console().print(_terminal_table(self._shown, step))
        if self.file and not is_fast_dev_run(trainer):
            with appending(self._path) as file:
                append_rows(file, [{"step": step, **row} for row in self._shown])
            self.written["completions"] = self._path
        if self.logger:
            for logger in trainer.loggers:
                _log_table(logger, self._shown, step)

    @property
    def _path(self) -> Path:
        return self.folder / COMPLETIONS


def _cut(path: Path, size: int) -> None:
    """Truncate a file that is longer than `size` bytes; delete it if `size` is 0."""
    with explaining_write_errors(path):
        if path.exists() and path.stat().st_size > size:
            if size:
                os.truncate(path, size)
            else:
                path.unlink()


def _terminal_table(rows: list[Row], step: int) -> Table:
    table = Table(title=f"Held-out prompts at step {step}", show_lines=True, expand=True)
    for title, share in {"prompt": 3, "policy": 4, "reference": 4}.items():
        table.add_column(title, ratio=share, overflow="fold")
    table.add_column("scores", justify="right")
    table.add_column("winner")
    for row in rows:
        prompt = _one_line(prompt_text(row["prompt"]))
        table.add_row(
            Text(prompt if len(prompt) <= PROMPT_TAIL else "…" + prompt[-PROMPT_TAIL:]),
            _completion(row["policy"], row["policy_ended"]),
            _completion(row["reference"], row["reference_ended"]),
            f"{row['policy_score']:.2f}\n{row['reference_score']:.2f}",
            _winner(row["label"]),
        )
    return table


def _completion(text: str, ended: bool) -> Text:
    line = _one_line(text)
    cut = not ended or len(line) > COMPLETION_HEAD
    return Text(line[:COMPLETION_HEAD] + " …" * cut)


def _one_line(text: str) -> str:
    """Replace line breaks by ⏎, and control characters, which could control the terminal, by �."""
    return printable(text.replace("\n", "⏎"), keep="")


def _winner(label: float) -> Text:
    if label == 0.5:
        return Text("tie", style="dim")
    return Text("policy", style="green") if label > 0.5 else Text("reference", style="red")


def _log_table(logger: Logger, rows: list[Row], step: int) -> None:
    columns = list(rows[0])
    data = [[prompt_text(row["prompt"]), *list(row.values())[1:]] for row in rows]
    if hasattr(logger, "log_table"):
        logger.log_table(key=TABLE_NAME, columns=columns, data=data, step=step)
        return
    add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
    if add_text is not None:
        add_text(TABLE_NAME, _markdown_table(columns, data), step)


def _markdown_table(columns: list[str], data: list[list[Any]]) -> str:
    cells = [[str(value).replace("|", "\\|").replace("\n", "<br>") for value in row] for row in data]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
