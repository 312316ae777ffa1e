"""Two processes do what one does: the same step on the same global batch, and together when something goes wrong."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BARE, TEST_PATHS

pytestmark = pytest.mark.slow
Begin = Callable[..., subprocess.Popen[str]]
Run = Callable[..., str]
FORKED_RUNS = Path(__file__).parents[1] / "forked_runs.py"
RANK = int(os.environ.get("LOCAL_RANK", "0"))


def noted(
    prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], folder: str, pause: float = 0.0
) -> list[float]:
    """Score by length, and write down what this process was given."""
    with (Path(folder) / f"rank{RANK}.jsonl").open("a") as file:
        file.write(json.dumps([prompts, completions]) + "\n")
    time.sleep(pause)
    return [len(text) + 0.01 * text.count("e") for text in completions]


def nan_on_rank_1(
    prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], folder: str
) -> list[float]:
    scores = noted(prompts, completions, columns, folder)
    with (Path(folder) / f"rank{RANK}.jsonl").open() as file:
        calls = len(file.readlines())
    return [math.nan if RANK == 1 and calls == 3 else score for score in scores]


def write_run(
    where: Path,
    model: str,
    processes: int,
    function: str = "noted",
    strategy: Any = "ddp",
    name: str | None = None,
    **changes: Any,
) -> Path:
    """Write the config of a run into a folder of its own, which has its number of processes for a name, or another."""
    folder = where / (name or str(processes))
    folder.mkdir(exist_ok=True)
    prompts = where / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat sat on the mat"}\n' * changes.pop("rows", 16))
    arguments = {"folder": str(folder), **changes.pop("arguments", {})}
    reward = {"function": f"{__name__}.{function}", "arguments": arguments}
    callbacks, validation_size = changes.pop("callbacks", []), changes.pop("validation_size", 4)
    if "reward" in changes:
        changes["reward"]["init_args"].setdefault("path", model)
    config = {
        "seed_everything": 1,
        "model": {
            "policy": {"path": model},
            "reward": {"class_path": "PythonReward", "init_args": reward},
            "sampling": {"max_new_tokens": 5},
            # Adam would turn rounding errors of a gradient near 0 into steps of either sign.
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            "micro_batch_tokens": 40,
            **changes,
        },
        "data": {
            "source": str(prompts),
            "validation_size": validation_size,
            "batch_size": 4 // processes,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": strategy if processes > 1 else "auto",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": {"class_path": "ResumableCSVLogger", "init_args": {"save_dir": str(folder), "name": ""}},
            "callbacks": [
                {"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}},
                *callbacks,
            ],
        },
        "defaults": BARE,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def words_of(config: Path, resume: bool, command: str = "fit") -> list[str]:
    return [command, "--config", str(config), *(["--ckpt_path", "last"] if resume else [])]


ENVIRONMENT = {**os.environ, "PYTHONPATH": TEST_PATHS, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def begin(model_folder: Callable[..., str]) -> Begin:
    """Give a function that begins the run of `write_run` as a user does: one process, which starts the others."""

    def start(where: Path, processes: int, *, resume: bool = False, **changes: Any) -> subprocess.Popen[str]:
        words = words_of(write_run(where, model_folder("llama"), processes, **changes), resume)
        return subprocess.Popen(
            [sys.executable, "-m", "xpo_lightning", *words],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def run(model_folder: Callable[..., str]) -> Iterator[Run]:
    """Give a function that makes the run of `write_run` without an import, to its good end; returns what it printed."""
    server = subprocess.Popen(
        [sys.executable, str(FORKED_RUNS)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def finish(where: Path, processes: int, *, resume: bool = False, command: str = "fit", **changes: Any) -> str:
        config = write_run(where, model_folder("llama"), processes, **changes)
        output = config.with_name("output.txt")
        output.write_text("")
        asked = {"words": words_of(config, resume, command), "processes": processes, "output": str(output)}
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status == "0\n", output.read_text()
        return output.read_text()

    yield finish
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a run, and return what it printed."""
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, output
    return output


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "version_0" / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "version_0" / "checkpoints").glob("*.ckpt"), key=os.path.getmtime)
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in state.values())
    return state


@pytest.fixture(scope="module")
def ended_runs(begin: Begin, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run of one process, `1`, and of the same run of two, `2`; both have ended."""
    folder = tmp_path_factory.mktemp("ended")
    run(folder, 1)
    ended(begin(folder, 2))
    return folder


def assert_same_steps(one: Path, two: Path) -> None:
    """Compare all numbers of two runs, and the weights at their ends."""
    assert len(metrics(one)) == len(metrics(two)) == 4
    for single, double in zip(metrics(one), metrics(two), strict=True):
        assert single.keys() == double.keys()
        for name, value in single.items():
            if name.endswith("accuracies") and single["step"] == 1:
                continue  # the sign of a margin that is 0 but for rounding: the policy is still its reference
            # A KL is a difference of sums of some 30 nats, which float32 rounds at 2e-6.
            assert double[name] == pytest.approx(value, rel=1e-5, abs=1e-5 if "kl" in name else 1e-6), name
    for (name, value), other in zip(weights(one).items(), weights(two).values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=name)


EVERYTHING: dict[str, Any] = {
    "sampler": {"class_path": "PolicySampler"},
    "candidates": {"count": 2, "choose": "best_and_worst"},
    "labels": {"rule": "bradley_terry", "flip": 0.2, "min_margin": 0.1},
    "buffer": {"keep": 2, "memory_pairs": 3},
    "bonus_on": "both",
    "alpha": 0.01,
    "entropy_bonus": 0.01,
}


LEARNING: dict[str, Any] = {
    "bonus": {"class_path": "COPOBonus", "init_args": {"learning_rate": 0.1}},
    "bonus_sampler": {"class_path": "MixtureSampler"},
    "alpha": 1.0,
}


@pytest.mark.parametrize("options", [EVERYTHING, LEARNING], ids=["everything", "a bonus that learns"])
def test_two_processes_take_the_steps_of_one_on_all_that_is_kept(run: Run, tmp_path: Path, options: dict[str, Any]):
    for processes in (1, 2):
        run(tmp_path, processes, **options)
    assert_same_steps(tmp_path / "1", tmp_path / "2")


def test_two_processes_take_the_steps_of_one_and_sample_what_it_samples(ended_runs: Path):
    one, two = ended_runs / "1", ended_runs / "2"
    assert_same_steps(one, two)
    ranks = [[json.loads(line)[1] for line in (two / f"rank{rank}.jsonl").open()] for rank in (0, 1)]
    assert all(mine != other for mine, other in zip(*ranks, strict=True)), "both processes sampled the same"


def test_trouble_in_one_process_stops_both_with_its_message(begin: Begin, tmp_path: Path):
    output = ended(begin(tmp_path, 2, function="nan_on_rank_1"), status=2)
    assert output.count("xpo: error: ") == 1
    assert "xpo: error: process 1: " in output
    assert "nan" in output
    assert "the cat sat on the mat" in output
    assert "Traceback" not in output
    weights(tmp_path / "2")


def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_both(run: Run, tmp_path: Path):
    run(tmp_path, 2, function="nan_on_rank_1", max_skipped_steps=1)
    assert [row["step"] for row in metrics(tmp_path / "2") if "loss/dpo" in row] == [1, 2]


def second_process(run: subprocess.Popen[str], note: Path) -> int:
    """Wait until the second process of a run is in its second step, and return its number."""
    while not note.exists() or len(note.read_text().splitlines()) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    child, *_ = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(child)


def assert_same_end(one: Path, other: Path) -> None:
    """Compare two runs bit for bit."""
    assert metrics(other) == metrics(one)
    for (name, value), same in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(value, same), name


def test_sigterm_to_one_process_stops_both_and_the_resumed_run_ends_the_same(
    begin: Begin, ended_runs: Path, tmp_path: Path
):
    process = begin(tmp_path, 2, arguments={"pause": 0.5})
    os.kill(second_process(process, tmp_path / "2" / "rank1.jsonl"), signal.SIGTERM)
    assert "Stopped at step 1" in ended(process, status=143)
    ended(begin(tmp_path, 2, resume=True))
    assert_same_end(ended_runs / "2", tmp_path / "2")


@pytest.mark.timeout(300)
def test_a_killed_process_ends_the_run_with_one_line_and_the_resumed_run_ends_the_same(
    begin: Begin, ended_runs: Path, tmp_path: Path
):
    process = begin(tmp_path, 2, arguments={"pause": 0.5})
    os.kill(second_process(process, tmp_path / "2" / "rank1.jsonl"), signal.SIGKILL)
    begun = time.monotonic()
    output = ended(process, status=1)
    assert time.monotonic() - begun < 60
    assert output.count("xpo: error: ") == output.count("xpo: error: process 1 is gone") == 1
    assert "Traceback" not in output
    ended(begin(tmp_path, 2, resume=True))
    assert_same_end(ended_runs / "2", tmp_path / "2")


@pytest.fixture
def begin_machines(model_folder: Callable[..., str]) -> Callable[..., list[subprocess.Popen[str]]]:
    """Give a function that begins a run of two groups of one process each, which find each other as two machines do."""

    def start(where: Path, name: str, **changes: Any) -> list[subprocess.Popen[str]]:
        config = write_run(where, model_folder("llama"), 2, name=name, **changes)
        changed = yaml.safe_load(config.read_text())
        changed["trainer"] |= {"devices": 1, "num_nodes": 2}
        config.write_text(yaml.safe_dump(changed))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        return [
            subprocess.Popen(
                [sys.executable, "-m", "xpo_lightning", *words_of(config, resume=False)],
                env={**ENVIRONMENT, **meeting, "NODE_RANK": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for number in range(2)
        ]

    return start


def test_two_machines_take_the_steps_of_one_process(run: Run, begin_machines: Callable[..., Any], tmp_path: Path):
    run(tmp_path, 1)
    for process in begin_machines(tmp_path, "machines"):
        ended(process)
    assert_same_steps(tmp_path / "1", tmp_path / "machines")


def test_a_machine_that_is_gone_ends_the_run_on_the_other_with_one_line(
    begin_machines: Callable[..., Any], tmp_path: Path
):
    first, second = begin_machines(tmp_path, "machines", arguments={"pause": 0.5})
    notes = tmp_path / "machines" / "rank0.jsonl"  # of both: each is the first process of its machine
    while not notes.exists():
        time.sleep(0.05)
    second.kill()
    begun = time.monotonic()
    output = ended(first, status=1)
    assert time.monotonic() - begun < 60
    assert output.count("xpo: error: ") == output.count("xpo: error: process 1 is gone") == 1
    assert "Traceback" not in output
    second.communicate()
