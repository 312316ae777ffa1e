"""Names the files that a run leaves, and finds a run by its folder."""

from dataclasses import dataclass
from pathlib import Path

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.run_folders import CONFIG, run_folders

METRICS, COMPLETIONS, START = "metrics.csv", "completions.jsonl", "start.json"
__all__ = ["COMPLETIONS", "CONFIG", "METRICS", "START", "RunFiles", "find_run", "find_runs"]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run that has logged something.

    Args:
        metrics: The run's metrics file; the other files are in the same folder.
    """

    metrics: Path

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.metrics.parent

    @property
    def name(self) -> str:
        """Name of the run: the last two parts of its folder, since the last one is often only a version."""
        return "/".join(part for part in self.folder.resolve().parts[-2:] if part != "/")

    def text(self, file: str) -> str | None:
        """Return a file of the run as text; None if it does not exist."""
        path = self.folder / file
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def find_run(run: str) -> RunFiles:
    """Find the run that an argument of the command line names.

    Args:
        run: A run's folder, the folder of its versions (the newest that has logged anything is taken), or its metrics
            file.

    Raises:
        InputError: There is no such run.
    """
    path = Path(run)
    if path.is_file():
        if path.suffix != ".csv":
            raise InputError(f"RUN: {path} is neither a run's folder nor a {METRICS}; give the folder")
        return RunFiles(path)
    if not path.is_dir():
        raise InputError(f"RUN: there is no {path}; give a run's folder, as runs/quickstart/version_0")
    found = next((folder for folder in run_folders(path) if (folder / METRICS).is_file()), None)
    if found is None:
        raise InputError(
            f"RUN: neither {path} nor a version_0, version_1, ... in it has a {METRICS}; give the folder of a run that "
            f"has logged something, and that has a ResumableCSVLogger or a CSVLogger"
        )
    return RunFiles(found / METRICS)


def find_runs(runs: list[str]) -> dict[str, RunFiles]:
    """Find several runs, and give each the shortest name that distinguishes it from the others.

    Raises:
        InputError: A run does not exist, or is given twice.
    """
    found = [find_run(run) for run in runs]
    places = [files.metrics.resolve() for files in found]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"RUN: {runs[number]} and {runs[places.index(place)]} are the same run; give it once")
    return dict(zip(_short_names(places), found, strict=True))


def _short_names(places: list[Path]) -> list[str]:
    """Strip the common beginning and end of the paths, but leave at least one part of each."""
    if len(places) == 1:
        return [RunFiles(places[0]).name]
    same_file = len({place.name for place in places}) == 1
    parts = [(place.parent if same_file else place).parts for place in places]
    shortest = min(map(len, parts))
    start = next((n for n in range(shortest) if len({part[: n + 1] for part in parts}) > 1), shortest - 1)
    end = next((n for n in range(shortest) if len({part[len(part) - n - 1 :] for part in parts}) > 1), shortest)
    return ["/".join(part[start : max(start + 1, len(part) - end)]) for part in parts]
