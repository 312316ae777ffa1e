"""`Throughput`: measures the speed of a run, and the time of each phase of a step."""

from collections import Counter, defaultdict
from contextlib import ExitStack
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from xpo_lightning.callbacks.base import is_fast_dev_run, our_module
from xpo_lightning.core.timer import Phase

TIMED = ("step", *get_args(Phase))


class Throughput(Callback):
    """Logs prompts and completion tokens per second, and the seconds of a training step and of each of its phases.

    `docs/metrics.md` gives the formulas. A step lasts from the start to the end of a training batch, without loading
    data, validation and checkpoints. Each number is an average over all steps since the last logged one
    (`trainer.log_every_n_steps`), and over processes; prompts and tokens are those of all processes.

    On a GPU the host reaches the end of a step before the device does, so start and end are marked on the device.
    Reading the marks waits for the device, which happens only at logged steps and before a validation.
    """

    def __init__(self) -> None:
        self._step = ExitStack()
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the module's timer.

        Raises:
            InputError: The module is another one, which has no timer.
        """
        self._timer = our_module(self, pl_module).timer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset all times and counts."""
        self._timer.reset()
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mark the start of the step."""
        self._step = ExitStack()
        self._step.enter_context(self._timer("step", pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of the step, and log the averages if the trainer logs this step."""
        self._step.close()
        if trainer._logger_connector.should_update_logs or is_fast_dev_run(trainer):
            self._keep()
            pl_module.log_dict(self._averages(trainer, pl_module.device))
            self._forget()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the times of training so far, because validation runs the same phases."""
        self._keep()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the times of validation."""
        self._timer.reset()

    def _forget(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    def _keep(self) -> None:
        """Move the timer's times and counts to this callback; on a GPU this waits for the device."""
        for name, seconds in self._timer.seconds().items():
            self._seconds[name] += seconds
        self._counts.update(self._timer.counts)
        self._timer.reset()

    def _averages(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        counts = [self._counts["prompts"], self._counts["completion_tokens"]]
        sums = torch.tensor([*counts, *(self._seconds[name] for name in TIMED)], dtype=torch.float32, device=device)
        prompts, tokens, *seconds = torch.as_tensor(trainer.strategy.reduce(sums, reduce_op="sum")).tolist()
        # Ranks wait for each other in each step, so their times are averaged, and their work is added up.
        timed = dict(zip(TIMED, (total / trainer.world_size for total in seconds), strict=True))
        return {
            "throughput/prompts_per_second": prompts / timed["step"],
            "throughput/tokens_per_second": tokens / timed["step"],
            **{f"time/{name}": total / self._counts["step"] for name, total in timed.items()},
        }
