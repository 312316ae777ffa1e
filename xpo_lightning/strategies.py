"""`FSDP2Strategy`: weights, gradients and optimizer state spread over all processes of a run."""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from xpo_lightning.run_folder.sharded_files import read_folder


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): each process has a part of every weight, and its own prompts.

    Samples, losses and weights are those of one process. While completions are sampled and scored, each process holds
    the policy, the reference and the reward whole: processes write completions of their own lengths, and must not wait
    for each other's layers. In forward and backward passes one layer is whole at a time.

    Args:
        save_distributed_checkpoint: Let each process save its own part, into a folder, rather than gather all of them
            in one file.
        process_group_backend: Backend of torch.distributed; by default that of the device.
        timeout: How long a process waits for others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Give all processes to data parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save; a folder is written beside its place and renamed, as files are."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        target = Path(self.broadcast(filepath))
        part, old = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.old.part")
        if self.global_rank == 0:
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.global_rank == 0:
            if target.exists():
                target.rename(old)
            part.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file or a folder, of which nothing may run code."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            read_folder(path)
        elif _without_optimizer_state(path):  # Lightning cannot load that: plain SGD has none.
            state: dict[str, Any] = {"state_dict": self.model}
            return _load_checkpoint(path, state, strict=False, weights_only=True)
        return super().load_checkpoint(path, weights_only=True)


def _without_optimizer_state(path: Path) -> bool:
    content: Mapping[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    return not any(state["state"] for state in content.get("optimizer_states", []))
