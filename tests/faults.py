"""Has one of several processes fail at each place of a run, sees how all of them end, and resumes the run.

    python tests/faults.py
    python tests/faults.py --strategies fsdp --weights lora --faults kill --ranks 1
    python tests/faults.py --only "ddp, full, nan in process 1, step: loss"

Each process is forked from one with everything imported, so that a run costs a second, not ten. Each must end within a
minute, with the right status and one line from the process that failed; and the run, started again by the same command,
must end as one in which nothing failed.
"""

import argparse
import atexit
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from fault_places import PLACES, InBackward, Place
from interruptions import digest, kill_group, quiet_trainer_of, save_model
from transformers.models.llama.modeling_llama import LlamaMLP

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.fault_tolerance import lifeline
from xpo_lightning.module import XPOLightningModule

LIMIT = 60
"""Seconds that processes may take to end, their start included."""
FAULTS = ("exception", "memory", "nan", "kill")
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": {"class_path": "FSDP2Strategy"}}
WEIGHTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {"r": 2}}}
STAGES = {
    "training": "training_step",
    "validation": "validation_step",
    "validation end": "on_validation_epoch_end",
    "prediction": "predict_step",
}
INJECTED = "injected by the test"


# ---- in the process that fails ----


@contextmanager
def staged(stage: str) -> Iterator[None]:
    """Note in which step this process is."""
    before, STAGE[0] = STAGE[0], stage
    try:
        yield
    finally:
        STAGE[0] = before


STAGE = [""]


def note_stages() -> None:
    """Have each step note that it is under way, and the MLPs let their gradients through `backward_passes`."""

    def noting(stage: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def noted(*args: Any, **options: Any) -> Any:
            with staged(stage):
                return step(*args, **options)

        return noted

    for stage, name in STAGES.items():
        setattr(XPOLightningModule, name, noting(stage, getattr(XPOLightningModule, name)))
    forward = LlamaMLP.forward
    LlamaMLP.forward = lambda self, x: InBackward.apply(forward(self, x))  # type: ignore[method-assign]


def strike(fault: str) -> None:
    """Fail."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory, {INJECTED}")
    raise RuntimeError(INJECTED)


def fail_at(place: Place, fault: str) -> None:
    """Have this process fail at a place."""
    hasten()
    function, left = getattr(place.owner, place.function), [place.occurrence]

    @wraps(function)
    def failing(*args: Any, **options: Any) -> Any:
        if place.stage in ("", STAGE[0]) and place.when(*args, **options):
            left[0] -= 1
            if left[0] == 0 and fault == "nan":
                return cast("Callable[[Any], Any]", place.spoil)(function(*args, **options))
            if left[0] == 0:
                strike(fault)
        return function(*args, **options)

    setattr(place.owner, place.function, failing)


def hasten() -> None:
    """Give processes less time to end by themselves: tries are many."""
    lifeline.GRACE = 2.0
    note_stages()


# ---- runs ----


def write_config(folder: Path, model: str, strategy: str, weights: str, processes: int = 2) -> Path:
    """Write the config of a run of 2 epochs of 2 steps, a validation after each, and a checkpoint at each step."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat sat on mat {n}"}) + "\n" for n in range(14)))
    batches = {"batch_size": 4 // processes, "validation_batch_size": 1}
    config = {
        "seed_everything": 1,
        "model": {
            "policy": {"path": model},
            "reward": {"class_path": "PythonReward", "init_args": {"function": "fault_places.letters"}},
            "sampling": {"max_new_tokens": 5},
            "learning_rate": 1e-2,
            "micro_batch_size": 1,
            **WEIGHTS[weights],
        },
        "data": {"source": str(prompts), "validation_size": 6, **batches},
        "trainer": {
            **quiet_trainer_of(folder),
            "strategy": STRATEGIES[strategy],
            "devices": processes,
            "max_epochs": 2,
            "callbacks": [
                {"class_path": "CompletionsTable", "init_args": {"terminal": False}},
                {"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}},
            ],
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(rank: int, port: int, words: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork one process of a run, and return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        prepare()
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # It closes connections, as the end of a process does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class Outcome:
    """How the processes of a run ended.

    Args:
        statuses: Exit status of each, below 0 for a signal; None where it had to be killed.
        printed: What each printed.
        seconds: How long it took until all had ended.
    """

    statuses: list[int | None]
    printed: list[str]
    seconds: float


def run(folder: Path, command: str, processes: int = 2, failing: int = -1, prepare: Any = None) -> Outcome:
    """Run all processes, one of which may be prepared to fail, until all have ended or `LIMIT` is over."""
    words = [command, "--config", str(folder / "run.yaml")]
    words += ["--ckpt_path", "last"] if command == "fit" else []
    logs, port, begun = [folder / f"log{rank}" for rank in range(processes)], free_port(), time.monotonic()
    children = {
        rank: start(rank, port, words, log, prepare if rank == failing else hasten) for rank, log in enumerate(logs)
    }
    statuses: list[int | None] = [None] * processes
    while children and time.monotonic() < begun + LIMIT:
        for rank, child in list(children.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                del children[rank]
        time.sleep(0.01)
    for child in children.values():
        kill_group(child)
        os.waitpid(child, 0)
    return Outcome(statuses, [log.read_text() for log in logs], time.monotonic() - begun)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# ---- what is right ----


def complaints(outcome: Outcome, failing: int, place: Place, fault: str) -> Iterator[str]:
    """Say what is wrong with the end of a run in which a process failed."""
    status = place.status(fault)
    for rank, found in enumerate(outcome.statuses):
        expected = -signal.SIGKILL if fault == "kill" and rank == failing else status
        if found != expected:
            yield f"process {rank} ended with {found}, not {expected}"
    lines = [(rank, line) for rank, text in enumerate(outcome.printed) for line in text.splitlines()]
    errors = [(rank, line) for rank, line in lines if line.startswith("xpo: error: ")]
    raised = [(rank, line) for rank, line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    tracebacks = {rank for rank, line in lines if "Traceback" in line}
    if fault == "kill" or status == 2:
        named = 0 if place.is_common and fault == "nan" else failing
        speaker = named if fault != "kill" else int(failing == 0)
        if [rank for rank, _ in errors] != [speaker] or f"process {named}" not in errors[0][1]:
            yield f"not one line of process {speaker} about process {named}: {errors}"
        if tracebacks:
            yield f"tracebacks from {tracebacks}"
    elif tracebacks != {failing} or errors or not raised or INJECTED not in raised[-1][1]:
        yield f"tracebacks from {tracebacks}, {raised}, {errors}"


def whole_digest(folder: Path, command: str) -> dict[str, str]:
    """Hash what a run has left."""
    if command == "fit":
        return digest(folder)
    files = sorted((folder / "runs").rglob("predictions*.jsonl"))
    return {file.name: file.read_text() for file in files}


@dataclass(frozen=True)
class Case:
    """A fault of one process of a run.

    Args:
        strategy: A key of `STRATEGIES`.
        weights: A key of `WEIGHTS`.
        fault: One of `FAULTS`.
        rank: The process that fails.
        place: Where it fails.
        processes: Processes of the run.
    """

    strategy: str
    weights: str
    fault: str
    rank: int
    place: Place
    processes: int

    def __str__(self) -> str:
        """Name it."""
        return f"{self.strategy}, {self.weights}, {self.fault} in process {self.rank}, {self.place.name}"

    @property
    def has_meaning(self) -> bool:
        """Whether there is such a fault."""
        return (self.fault != "nan" or self.place.spoil is not None) and self.rank in self.place.ranks

    def run(self, folder: Path, model: str, *, fails: bool = False) -> Outcome:
        """Run all processes in a folder, to the end or until the fault."""
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, model, self.strategy, self.weights, self.processes)
        failing = self.rank if fails else -1
        return run(folder, self.place.command, self.processes, failing, partial(fail_at, self.place, self.fault))


def try_fault(case: Case, folder: Path, model: str, whole: dict[str, str]) -> list[str]:
    """Have a run fail, resume it, and say how long it took to end, and what is wrong."""
    broken = case.run(folder, model, fails=True)
    wrong = list(complaints(broken, case.rank, case.place, case.fault))
    resumed = case.run(folder, model)
    if any(resumed.statuses):
        wrong.append(f"the resumed run ended with {resumed.statuses}: {resumed.printed}")
    elif whole_digest(folder, case.place.command) != whole:
        wrong.append("the resumed run has another end")
    if wrong:
        wrong += broken.printed
    return [f"{broken.seconds:.1f} s", *wrong]


def cases(arguments: argparse.Namespace) -> list[Case]:
    """List the faults to try."""
    chosen = itertools.product(
        arguments.strategies, arguments.weights, arguments.faults, arguments.ranks, PLACES, [arguments.processes]
    )
    every = [case for case in itertools.starmap(Case, chosen) if case.has_meaning]
    every = [case for case in every if re.search(arguments.places, case.place.name)]
    if arguments.only:
        return [case for case in every if str(case) in arguments.only]
    some = random.Random(arguments.seed).sample(range(len(every)), min(arguments.sample or len(every), len(every)))
    return [every[number] for number in sorted(some)]


def sweep(work: Path, model: str, chosen: list[Case]) -> int:
    """Try all; return how many went wrong."""
    wholes: dict[tuple[str, str, str], dict[str, str]] = {}
    failures = 0
    for number, case in enumerate(chosen):
        key = (case.strategy, case.weights, case.place.command)
        if key not in wholes:
            outcome = case.run(work / "-".join(key), model)
            if any(outcome.statuses):
                raise RuntimeError(f"{outcome.statuses}\n" + "\n".join(outcome.printed))
            wholes[key] = whole_digest(work / "-".join(key), case.place.command)
        took, *wrong = try_fault(case, work / str(number), model, wholes[key])
        failures += bool(wrong)
        print(f"{case}: {'WRONG' if wrong else 'right'} ({took})")
        for text in wrong:
            print(textwrap.indent(text[-3000:], "    "))
        sys.stdout.flush()
        if not wrong:
            shutil.rmtree(work / str(number))
    print(f"{len(chosen)} faults, {failures} wrong")
    return failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 1], help="which process fails")
    parser.add_argument("--processes", type=int, default=2, help="processes of a run")
    parser.add_argument("--places", default="", help="a regular expression for names of places")
    parser.add_argument("--sample", type=int, help="how many of all that is left to try, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    parser.add_argument("--only", nargs="+", help="these faults alone, by the names that they are listed with")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.argv = sys.argv[:1]
    work = tempfile.mkdtemp()  # A `TemporaryDirectory` would be removed by the first child that ends.
    try:
        save_model(f"{work}/model")
        failures = sweep(Path(work), f"{work}/model", cases(arguments))
    finally:
        shutil.rmtree(work)
    sys.exit(bool(failures))
