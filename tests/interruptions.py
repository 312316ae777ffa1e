"""Kills a run again and again, resumes it each time, and compares its end with that of a run that was never stopped.

    python tests/interruptions.py --kills 25 --processes 1
    python tests/interruptions.py --kills 25 --folders

Each run is a child that is forked from a process with everything imported, so that a kill costs a second, not ten.
Kills come at random moments, every second one in the middle of writing: a checkpoint (with `--folders`, one of FSDP2),
an export, a report, metrics, completions, or what a run says at its start.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import PreTrainedTokenizerBase

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.timer import PhaseTimer

WRITES_OF_A_STEP = 25
"""About how often a step with all its files asks for bytes to be synced, or renames or removes what is complete."""
WRITTEN = ("metrics.csv", "completions.jsonl", "report.html", "start.json", "last.ckpt", "an export")
FOLDERS = {"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score with the global random state too, which a resumed run must have back."""
    return [len(text) + 0.01 * text.count("e") + random.random() for text in completions]


def write_config(folder: Path, model: str, processes: int, folders: bool = False) -> Path:
    """Write the config of a run of 2 epochs with LoRA, dropout, a cache, validation, and a checkpoint at each step."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat sat on mat {n}"}) + "\n" for n in range(16)))
    several: dict[str, Any] = {"strategy": FOLDERS if folders else "auto", "devices": 1}
    if processes > 1:
        several = {"strategy": "ddp_fork", "devices": processes}
    config = {
        "seed_everything": 1,
        "model": {
            "policy": {"path": model},
            "lora": {"r": 2, "dropout": 0.2},
            "reward": {"class_path": "PythonReward", "init_args": {"function": "interruptions.letters"}},
            "sampling": {"max_new_tokens": 5},
            "learning_rate": 1e-2,
            "warmup_ratio": 0.2,
            "reference_cache": "memory",
        },
        "data": {"source": str(prompts), "validation_size": 4, "batch_size": 4 // processes},
        "trainer": {
            **quiet_trainer_of(folder),
            **several,
            "max_epochs": 2,
            "val_check_interval": 2,
            "callbacks": [
                {"class_path": "CompletionsTable", "init_args": {"terminal": False}},
                {"class_path": "RunSummary"},
                {"class_path": "RunReport"},
                {"class_path": "PolicyExport", "init_args": {"at": "validation"}},
                {"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}},
            ],
        },
        "defaults": {"baseline": False, "learning_curves": False},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def quiet_trainer_of(folder: Path) -> dict[str, Any]:
    """Give the trainer's options of a run that leaves its files in a folder, and shows nothing."""
    runs = str(folder / "runs")
    return {
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": runs,
        "logger": {"class_path": "ResumableCSVLogger", "init_args": {"save_dir": runs, "name": ""}},
    }


def save_model(folder: str) -> None:
    """Save a tiny policy and its tokenizer."""
    from conftest import CONFIGS, make_tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def die() -> None:
    """Kill this process and those that it has started."""
    os.killpg(0, signal.SIGKILL)


def die_between_writes(after: int) -> None:
    """Have this process killed at one of the calls by which something that is complete comes to its place."""
    left = [after]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                die()
            return call(*args, **options)

        return wrapped

    os.fsync, os.replace, os.rename = deadly(os.fsync), deadly(os.replace), deadly(os.rename)
    shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]


def die_in(name: str, after: int) -> None:
    """Have this process killed when it has written a half of what it writes into a file for the n-th time."""
    left, opened = [after], Path.open

    def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        if mode[0] not in "wa" or name not in str(path):
            return file
        write = file.write

        def half(data: Any) -> int:
            left[0] -= 1
            if left[0] > 0:
                return int(write(data))
            write(data[: len(data) // 2])
            file.flush()
            die()
            return 0

        return Killing(file, half)

    Path.open = opening  # type: ignore[method-assign,assignment]


class Killing:
    """A file whose bytes go through a function."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Killing":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)


def die_in_export(after: int) -> None:
    """Have this process killed in an export, when the weights are written and the tokenizer is not."""
    left, save = [after], PreTrainedTokenizerBase.save_pretrained

    def saving(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            die()
        return save(*args, **options)

    PreTrainedTokenizerBase.save_pretrained = saving


def some_way_to_die(generator: random.Random) -> Callable[[], None]:
    """Choose one in the middle of writing."""
    name = generator.choice((*WRITTEN, "anything", "anything"))
    if name == "anything":
        return partial(die_between_writes, generator.randint(1, 2 * WRITES_OF_A_STEP))
    if name == "an export":
        return partial(die_in_export, generator.randint(1, 2))
    return partial(die_in, name, generator.randint(1, 3))


def start(config: Path, log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a run, as the leader of a process group of its own, and return its number; `prepare` is called in it."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        prepare()
        main(["fit", "--config", str(config), "--ckpt_path", "last"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int, limit: float | None = None) -> int:
    """Wait for a run, kill it with its whole group after the limit, and return its status: below 0 for a signal."""
    end = None if limit is None else time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            kill_group(child)
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            kill_group(child)
            end = None
        time.sleep(0.005)


def kill_group(leader: int) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def content_of(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or a folder, in the form of a file."""
    if path.is_file():
        content: dict[str, Any] = torch.load(path, weights_only=True)
        return content
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(path, file.name)
        spread = torch.load(file.name, weights_only=True)
    return {**torch.load(path / "meta.pt", weights_only=True), **spread, "optimizer_states": [spread["optimizer_0"]]}


def digest(folder: Path) -> dict[str, str]:
    """Hash what a run has left: the last state of weights, optimizer and schedule, its metrics and its completions."""
    # A run that was killed before its first checkpoint has left a folder that nothing goes on from.
    version = max((folder / "runs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    last = content_of(version / "checkpoints" / "last.ckpt")
    total = hashlib.sha256()
    for name, value in last["state_dict"].items():
        total.update(name.encode() + value.numpy().tobytes())
    for state in last["optimizer_states"][0]["state"].values():
        for value in state.values():
            total.update(value.numpy().tobytes())
    total.update(
        repr((last["lr_schedulers"], last["global_step"], last["optimizer_states"][0]["param_groups"])).encode()
    )
    parts = [*version.rglob("*.part"), *version.rglob("*.old"), *version.rglob(".run.lock")]
    report = _content(version / "report.html").decode().strip()
    return {
        "state": total.hexdigest(),
        "metrics.csv": (version / "metrics.csv").read_text(),
        "completions.jsonl": _content(version / "completions.jsonl").decode(),
        "export": hashlib.sha256(_content(version / "policy" / "model.safetensors")).hexdigest(),
        "report": f"{report[:15]} {report[-7:]}",
        "parts left": repr(sorted(path.name for path in parts)),
    }


def _content(file: Path) -> bytes:
    """Read what a run may have been asked to write."""
    return file.read_bytes() if file.exists() else b""


def sweep(
    folder: Path, model: str, kills: int, processes: int, seed: int = 0, folders: bool = False
) -> tuple[int, dict[str, str], dict[str, str]]:
    """Run once to the end, and once with kills.

    Returns:
        How many kills hit a run, and the digests of both.
    """
    whole, broken = folder / "whole", folder / "broken"
    for part in (whole, broken):
        part.mkdir(parents=True)
    config = write_config(whole, model, processes, folders)
    begun = time.monotonic()
    if finish(start(config, whole / "log")) != 0:
        raise RuntimeError((whole / "log").read_text())
    took = time.monotonic() - begun
    config, generator, hits = write_config(broken, model, processes, folders), random.Random(seed), 0
    for number in range(10 * kills):
        if hits == kills:
            break
        if number % 2:
            status = finish(start(config, broken / "log", some_way_to_die(generator)))
        else:
            status = finish(start(config, broken / "log"), limit=generator.uniform(0.1, 0.6) * took)
        if status == 0:  # It got to its end; begin anew.
            expected, found = digest(whole), digest(broken)
            if expected != found:
                return hits, expected, found
            os.rename(broken, folder / f"done{number}")
            broken.mkdir()
            config = write_config(broken, model, processes, folders)
        elif status == -signal.SIGKILL:
            hits += 1
        else:
            raise RuntimeError((broken / "log").read_text())
    if finish(start(config, broken / "log")) != 0:
        raise RuntimeError((broken / "log").read_text())
    return hits, digest(whole), digest(broken)


def signal_in(phase: str, occurrence: int, numbers: list[int]) -> None:
    """Have this process send itself signals when it is in some phase of a step for the n-th time."""
    enter, left = PhaseTimer.__call__, [occurrence]

    @contextmanager
    def signalling(self: PhaseTimer, name: Any, device: Any = "cpu") -> Iterator[None]:
        with enter(self, name, device):
            if name == phase:
                left[0] -= 1
                if left[0] == 0:
                    for number in numbers:
                        os.kill(os.getpid(), number)
            yield

    PhaseTimer.__call__ = signalling  # type: ignore[method-assign,assignment]


def stop_and_resume(folder: Path, model: str, phase: str, occurrence: int, numbers: list[int]) -> dict[str, Any]:
    """Stop a run by signals in some phase, and resume it.

    Returns:
        The exit status, whether a checkpoint was saved for it, what was printed, and the digest of the resumed run.
    """
    folder.mkdir()
    config = write_config(folder, model, 1)
    status = finish(start(config, folder / "log", lambda: signal_in(phase, occurrence, numbers)))
    saved, printed = bool(list(folder.rglob("stopped.ckpt"))), (folder / "log").read_text()
    if finish(start(config, folder / "log")) != 0:
        raise RuntimeError((folder / "log").read_text())
    return {"status": status, "saved": saved, "printed": printed, "digest": digest(folder)}


def stops(folder: Path, model: str) -> dict[str, Any]:
    """Stop runs in every phase of a training step and of a validation, by SIGTERM and by Ctrl-C."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    if finish(start(write_config(whole, model, 1), whole / "log")) != 0:
        raise RuntimeError((whole / "log").read_text())
    found: dict[str, Any] = {"whole": digest(whole)}
    # The third rollout is that of the first validation: it comes after two steps.
    for phase, occurrence in {
        "policy_rollout": 2,
        "reward": 2,
        "policy_forward": 2,
        "backward": 4,
        "optimizer": 3,
    }.items():
        found[f"SIGTERM in {phase}"] = stop_and_resume(folder / phase, model, phase, occurrence, [signal.SIGTERM])
    for phase, occurrence in {"reference_rollout": 3, "reward": 3}.items():
        name = f"SIGTERM in validation, {phase}"
        found[name] = stop_and_resume(folder / f"validation {phase}", model, phase, occurrence, [signal.SIGTERM])
    found["Ctrl-C once"] = stop_and_resume(folder / "once", model, "reward", 4, [signal.SIGINT])
    found["Ctrl-C twice"] = stop_and_resume(folder / "twice", model, "reward", 4, [signal.SIGINT, signal.SIGINT])
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="kills that have to hit a run")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run")
    parser.add_argument("--folders", action="store_true", help="spread weights over processes, and save folders")
    parser.add_argument("--seed", type=int, default=0, help="decides when the kills come")
    parser.add_argument("--signals", action="store_true", help="stop runs by signals too, and print a JSON report")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.argv = sys.argv[:1]
    sys.modules["interruptions"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as work:
        save_model(f"{work}/model")
        of_run = (arguments.kills, arguments.processes, arguments.seed, arguments.folders)
        hits, expected, found = sweep(Path(work), f"{work}/model", *of_run)
        same = expected == found
        for name in expected:
            if expected[name] != found[name]:
                print(f"--- {name}, never stopped:\n{expected[name]}\n--- killed:\n{found[name]}")
        print(f"{hits} kills, {arguments.processes} process(es): {'the same end' if same else 'ANOTHER END'}")
        if arguments.signals:
            print(json.dumps(stops(Path(work, "signals"), f"{work}/model")))
        sys.exit(not same)
