"""Runs of `xpo fit`, several at a time, that are not made again where they are finished."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xpo_lightning
from xpo_lightning.core.atomic_files import replacing_file

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        arm: Its overlay.
        seed: Its seed.
        folder: Where its metrics and its log go.
        options: The options of `xpo fit`, except where to write.
        path: Further folders that modules may be imported from.
    """

    arm: str
    seed: int
    folder: Path
    options: tuple[str, ...]
    path: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the run is made with: its options, and what the YAML files among them say."""
        files = {option: (ROOT / option).read_text() for option in self.options if option.endswith(".yaml")}
        return {"options": list(self.options), "files": files}

    @property
    def is_finished(self) -> bool:
        """Whether the run has been made.

        Raises:
            SystemExit: It has been made with other settings.
        """
        mark = self.folder / "finished.json"
        if not mark.exists():
            return False
        made = json.loads(mark.read_text())
        if {name: made[name] for name in self.settings} != self.settings:
            raise SystemExit(f"{self.folder} was made with other settings; choose another --out, or remove it")
        return True

    def make(self, threads: int) -> float | None:
        """Make the run from its beginning; return the processor's seconds, or None where it failed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        where = ("--trainer.default_root_dir", str(self.folder))
        command = [sys.executable, "-m", "xpo_lightning", "fit", *self.options, *where]
        python_path = os.pathsep.join(filter(None, (str(ROOT), *self.path, os.environ.get("PYTHONPATH"))))
        env = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": str(threads)}
        with (self.folder / "log.txt").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)  # noqa: S603
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            return None
        seconds = used.ru_utime + used.ru_stime
        made = {**self.settings, "version": version(), "cpu_seconds": round(seconds, 1)}
        with replacing_file(self.folder / "finished.json") as file:
            json.dump(made, file, indent=1)
        return seconds


def make_all(runs: Sequence[Run], processes: int) -> int:
    """Make the runs that are missing, several at a time; return how many failed."""
    left = [run for run in runs if not run.is_finished]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    threads = max(1, (os.cpu_count() or 1) // processes)

    def make(run: Run) -> bool:
        seconds = run.make(threads)
        said = f"failed, see {run.folder / 'log.txt'}" if seconds is None else f"{seconds:.0f} s of the processor"
        print(f"{run.folder.parent.name}: {run.arm}, seed {run.seed}: {said}", flush=True)
        return seconds is None

    with ThreadPoolExecutor(processes) as pool:
        return sum(pool.map(make, left))


@cache
def version() -> str:
    """Return the version of the code: the package's, and the commit where there is one."""
    git = shutil.which("git")
    command = [git or "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if git else None  # noqa: S603
    commit = "" if done is None else done.stdout.strip()
    return f"{xpo_lightning.__version__}+{commit}" if commit else str(xpo_lightning.__version__)
