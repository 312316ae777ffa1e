"""The cache of what the reference writes, on two processes: each knows what the other has kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import completions_of, prompts_of
from interruptions import write_config

from xpo_lightning.rollout.reference_cache import ReferenceCache

pytestmark = pytest.mark.timeout(180)


def noted(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], folder: str) -> list[float]:
    """Score by length, write down how many completions there were, and stop the run at some call."""
    rank = torch.distributed.get_rank()
    with (Path(folder) / f"rank{rank}.jsonl").open("a") as file:
        file.write(f"{len(completions)}\n")
    if rank == 1 and len((Path(folder) / f"rank{rank}.jsonl").read_text().splitlines()) == int(os.environ["STOP_AT"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return [len(text) + 0.01 * text.count("e") for text in completions]


def run(folder: Path, model: str, status: int = 0, stop_at: int = 0) -> None:
    """Run two epochs of three batches of two prompts a process, without validation, or go on with them."""
    folder.mkdir(exist_ok=True)
    file = write_config(folder, model, 2)
    config = yaml.safe_load(file.read_text())
    reward = {"function": f"{__name__}.noted", "arguments": {"folder": str(folder)}}
    config["model"] |= {"reward": {"class_path": "PythonReward", "init_args": reward}, "reference_cache": "memory"}
    checkpoints = [each for each in config["trainer"]["callbacks"] if each["class_path"] == "RunCheckpoint"]
    config["trainer"] |= {"strategy": "ddp", "limit_val_batches": 0, "callbacks": checkpoints}
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "xpo_lightning", "fit", "--config", str(file), "--ckpt_path", "last"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STOP_AT": str(stop_at)},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == status, done.stdout + done.stderr


def asked(folder: Path) -> list[list[int]]:
    return [[int(line) for line in (folder / f"rank{rank}.jsonl").read_text().split()] for rank in (0, 1)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(next(folder.rglob("last.ckpt")), weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
def test_second_epoch_hits_as_on_one_process_and_resumes_exactly(model_folder: Any, tmp_path: Path):
    run(tmp_path / "whole", model_folder("llama"))
    first, second = [4] * 3, [2] * 3
    assert asked(tmp_path / "whole") == [[*first, *second]] * 2, "a prompt goes to another process, and is known there"
    run(tmp_path / "stopped", model_folder("llama"), status=143, stop_at=3)
    run(tmp_path / "stopped", model_folder("llama"))
    assert asked(tmp_path / "stopped") == [[4, 4, 4, 4, *second]] * 2, "the third batch is taken again from its start"
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_folder_of_more_processes_serves_one(tmp_path: Path):
    """And the other way round: a process takes over what others have kept, not what is another model's."""
    identity = {"model": "one"}
    for rank, tokens in ((0, 5), (0, 6), (1, 7)):
        kept = ReferenceCache(str(tmp_path), identity, rank)
        kept.put(prompts_of([[tokens]]), completions_of([[1, 2]]), torch.tensor([float(tokens)]))
        kept.settle(keep=True)
    for rank in (0, 2):
        later = ReferenceCache(str(tmp_path), identity, rank)
        found = [later.get(prompts_of([[tokens]]))[0] for tokens in (5, 6, 7, 8)]
        assert [entry.score if entry else None for entry in found] == [5.0, 6.0, 7.0, None]
