"""Runs a function in two processes that talk to each other, forked from this one, so that nothing is imported again."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh

PATIENCE = 100.0  # seconds


def in_two(function: Callable[[int, Any], Any]) -> list[Any]:
    """Call a function with the rank and the device mesh of each process.

    Returns:
        What it returns, or the error that it raises, of each process.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(target=_be_one, args=(function, rank, Path(folder) / "meeting", pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            return [_received(end) for end, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _received(end: Any) -> Any:
    assert end.poll(PATIENCE), "a process does not end"
    return end.recv()


def _be_one(function: Callable[[int, Any], Any], rank: int, meeting: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    try:
        pipe.send(function(rank, mesh))
    except Exception as error:
        pipe.send(error)
        raise
    destroy_process_group()
