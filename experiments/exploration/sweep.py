"""Goes through runs, several at a time, and leaves out those that are finished."""

import hashlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import yaml
from plan import Run
from problems import PROBLEMS, write

from xpo_lightning.cli.lightning_cli import main

HERE = Path(__file__).resolve().parent


def sweep(runs: Sequence[Run], out: Path, seeds: int, processes: int, logs: bool = False) -> list[str]:
    """Do the runs that are not done.

    A run that was broken off begins anew; one whose configs or problem have changed since is done again.

    Args:
        runs: The runs.
        out: Folder of problems and runs.
        seeds: Independent repetitions.
        processes: Runs at a time.
        logs: Let Lightning log all metrics of each step too, which takes half as long again.

    Returns:
        Names of runs that failed.
    """
    for name in sorted({run.problem for run in runs}):
        write(PROBLEMS[name], out / "problems", seeds)
    waiting = [run for run in runs if not is_done(run, out, logs)]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", flush=True)
    failed, begun = [], time.monotonic()
    # A forked process would inherit the parent's threads half alive.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(do, run, out, logs): run for run in waiting}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            problem, seconds = future.result()
            failed += [run.name] * (problem is not None)
            said = f"{seconds:.0f} s of CPU" if problem is None else f"FAILED: {problem}"
            passed = time.monotonic() - begun
            print(f"[{number}/{len(waiting)}, {passed:.0f} s] {run.name}: {said}", flush=True)
    return failed


def do(run: Run, out: Path, logs: bool = False) -> tuple[str | None, float]:
    """Do a run in this process; return what went wrong, if anything, and the CPU seconds it took."""
    folder = out / run.name
    if is_done(run, out, logs):  # by another sweep, meanwhile
        return None, 0.0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, begun = arguments(run, out, logs), time.process_time()
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log), warnings.catch_warnings():
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print("xpo", *command, flush=True)
        try:
            main(command)
        except SystemExit as end:
            if end.code:
                return f"exit status {end.code}, see {folder / 'log.txt'}", 0.0
    seconds = time.process_time() - begun
    (folder / "seconds.txt").write_text(f"{seconds:.1f}\n")
    partial = folder / "inputs.partial"
    partial.write_text(inputs(run, out, logs))
    os.replace(partial, folder / "inputs.txt")
    return None, seconds


def arguments(run: Run, out: Path, logs: bool = False) -> list[str]:
    """Compose a run's command line, and write the last of the configs that it names."""
    folder = out / run.name
    trainer = {"default_root_dir": str(folder), "max_steps": run.steps}
    if logs:
        logger = {"save_dir": str(folder), "name": "", "version": ""}
        trainer["logger"] = {"class_path": "ResumableCSVLogger", "init_args": logger}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": run.model, "trainer": trainer}))
    return ["fit", *(word for config in _configs(run, out, logs) for word in ("--config", str(config)))]


def _configs(run: Run, out: Path, logs: bool) -> list[Path]:
    common = [HERE / "base.yaml", out / "problems" / run.problem / "problem.yaml", HERE / "arms" / f"{run.arm}.yaml"]
    return [*common, *([] if logs else [HERE / "fast.yaml"]), out / run.name / "run.yaml"]


def inputs(run: Run, out: Path, logs: bool = False) -> str:
    """Return a hash of all that a run's numbers depend on, but for the code."""
    problem = out / "problems" / run.problem
    files = [*_configs(run, out, logs)[:-1], problem / "problem.json", problem / "model.safetensors"]
    digest = hashlib.sha256(repr((run, run.steps)).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() + "\n"


def is_done(run: Run, out: Path, logs: bool = False) -> bool:
    """Tell whether a run came to its end, with the inputs that it would have now."""
    done = out / run.name / "inputs.txt"
    return done.is_file() and done.read_text() == inputs(run, out, logs)
