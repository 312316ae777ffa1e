"""`ResumableCSVLogger`: a metrics file that a resumed run continues, and that a kill leaves intact."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from xpo_lightning.core.atomic_files import appending, explaining_write_errors, replacing_file
from xpo_lightning.core.errors import InputError


class ResumableCSVLogger(CSVLogger):
    """Lightning's `CSVLogger`, with a `metrics.csv` that a resumed run continues.

    A run that is resumed in its old folder keeps the rows that its checkpoint counts, through the `RunContinuation`
    callback; any other run begins a new file, as with `CSVLogger`, unless `appends` is set. The file is complete at any
    moment: when its columns change, the new file is written beside the old one and then replaces it.

    Attributes:
        appends: Whether another run adds its rows to the file that is there, as each `xpo validate` does.
    """

    appends = False

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The metrics file."""
        if not isinstance(self._experiment, MetricsFile):
            self._experiment = MetricsFile(self.log_dir, self.appends)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Write no `hparams.yaml`: the run's `config.yaml` has the same settings."""

    @property
    def rows_written(self) -> int:
        """Number of this run's rows in the file, without those that `save` has not written yet. Rank 0 only."""
        rows: int = self.experiment.rows
        return rows

    @rank_zero_only
    def keep_rows(self, count: int) -> None:
        """Keep the first rows of the file that an earlier process left, drop the others, and continue after them.

        Args:
            count: How many rows. A column that none of them uses is dropped, so that the file is the one that the
                earlier process had at that moment.
        """
        self.experiment.keep_rows(count)

    @rank_zero_only
    def begin(self) -> None:
        """Remove the file of another run, unless `keep_rows` was called. Writing the first row does so too."""
        self.experiment.begin()


class MetricsFile(ExperimentWriter):
    """Writes rows of metrics: one column per metric in alphabetical order, empty in rows without that metric.

    Args:
        log_dir: The folder of the file; created if it does not exist.
        appends: Whether to keep all rows of a file that is there.

    Attributes:
        rows: Number of this run's rows in the file.

    Raises:
        InputError: The folder is not on this machine, or cannot be created.
    """

    def __init__(self, log_dir: str, appends: bool = False) -> None:
        if "://" in log_dir:
            raise InputError(
                f"trainer.logger: ResumableCSVLogger writes to local folders, and '{log_dir}' is none; use "
                f"lightning.pytorch.loggers.CSVLogger"
            )
        with explaining_write_errors(Path(log_dir)):
            super().__init__(log_dir)
        self.rows = 0
        self._path = Path(self.metrics_file_path)
        self._begun = appends

    def begin(self) -> None:
        """Remove the file of another run, unless this run continues it."""
        if self._begun:
            return
        self._begun = True
        if self._path.exists():
            rank_zero_warn(f"{self._path} of an earlier run is replaced")
            with explaining_write_errors(self._path):
                self._path.unlink()

    def keep_rows(self, count: int) -> None:
        """Keep the first rows of the file, drop the others, and continue after them."""
        rows = self._read()[:count]
        if len(rows) < count:
            rank_zero_warn(f"{self._path} has lost {count - len(rows)} rows since the checkpoint was written")
        self._begun, self.metrics = True, []
        self._write(rows)

    def save(self) -> None:
        """Write the rows that were logged since the last call."""
        if not self.metrics:
            return
        self.begin()
        if self._path.exists() and set().union(*self.metrics) <= set(self.metrics_keys):
            with appending(self._path, newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
            self.rows += len(self.metrics)
        else:
            self._write([*self._read(), *self.metrics])
        self.metrics = []

    def _check_log_dir_exists(self) -> None:
        """Keep an existing file, which the parent class would delete: this run may turn out to be a resumed one."""

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"'{self._path}' is damaged ({error}); move it away, and the run begins another"
            ) from error
        # A killed process may leave a row that is too long or too short; only its cells without a column are dropped.
        return [{name: cell for name, cell in row.items() if name is not None and cell is not None} for row in rows]

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file by one with these rows, and the columns that they use."""
        names = sorted({name for row in rows for name, cell in row.items() if cell not in ("", None)})
        if rows:
            with replacing_file(self._path, newline="") as file:
                writer = csv.DictWriter(file, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        else:  # A run that has not logged yet has no file.
            with explaining_write_errors(self._path):
                self._path.unlink(missing_ok=True)
        self.metrics_keys, self.rows = names, len(rows)
