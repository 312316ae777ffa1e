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

    Samples, losses and weights are the same as with one process. In forward and backward passes, a few layers are
    unsharded at a time. Where an engine writes the completions (`model.rollout`), that holds for scoring too, and no
    process ever has a whole model on its device. Without an engine, each process holds the policy, the reference and
    the reward unsharded while completions are sampled and scored: processes generate completions of different lengths,
    and must not wait for each other's layers.

    Args:
        save_distributed_checkpoint: Let each process save its own shards into a folder, instead of gathering all of
            them in one file.
        process_group_backend: Backend of torch.distributed; by default that of the device.
        timeout: How long a process waits for others.
        reduce_each_micro_batch: Add up the gradients of all processes after each micro-batch, so that each keeps its
            part alone. If false, each process keeps a whole gradient of its own until the last micro-batch, which takes
            more memory, and one exchange a step.
        offload_reference: Keep this process's part of the frozen reference in main memory, from where each layer is
            copied to the device when it runs. For runs that train all weights: with `model.lora` there is no second
            model.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        reduce_each_micro_batch: bool = False,
        offload_reference: bool = False,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reduce_each_micro_batch, self.offload_reference = reduce_each_micro_batch, offload_reference

    def setup_environment(self) -> None:
        """Use all processes for data parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the prompts that is this process's; `xpo check` asks before there are others."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

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
