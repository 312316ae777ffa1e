"""`FSDP2Strategy`: shards weights, gradients and optimizer state over all ranks of a run."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from xpo_lightning.checkpointing.sharded_io import load_folder, save_folder


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): each process has a shard of every weight, and its own prompts.

    Samples, losses and weights are the same as with one process. While completions are sampled and scored, each
    process holds the policy, the reference and the reward unsharded: processes generate completions of different
    lengths, and must not wait for each other's layers. In forward and backward passes, one layer is unsharded at a
    time.

    Args:
        save_distributed_checkpoint: Let each process save its own shards into a folder, instead of gathering all of
            them in one file.
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
        """Use all processes for data parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save a file or a folder; only a complete one replaces an earlier one."""
        if self._save_distributed_checkpoint:
            save_folder(checkpoint, Path(self.broadcast(filepath)))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file or a folder, without running code that it may hold."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return load_folder(path, cast("nn.Module", self.model), self.optimizers)
        if _without_optimizer_state(path):  # Plain SGD has none, and Lightning cannot load such a checkpoint.
            state: dict[str, Any] = {"state_dict": self.model}
            return _load_checkpoint(path, state, strict=False, weights_only=True)
        return super().load_checkpoint(path, weights_only=True)


def _without_optimizer_state(path: Path) -> bool:
    content: Mapping[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    return not any(state["state"] for state in content.get("optimizer_states", []))
