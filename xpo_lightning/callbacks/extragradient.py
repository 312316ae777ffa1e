"""`Extragradient`: steps from where the policy was, on pairs from where a step would have brought it."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from xpo_lightning.callbacks.base import is_fast_dev_run, our_module
from xpo_lightning.core.batch import Experience
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.trainer_progress import batches_done
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.module import XPOLightningModule


class Extragradient(Callback):
    """Takes each second step from the weights before the first one, on pairs that the policy after the first one wrote.

    EGPO (Zhou et al. 2025, arXiv 2503.08942): with theta the weights before a batch, that batch's step gives
    theta + 1/2. The policy with these writes the next batch, then the weights and the optimizer's state go back to
    theta, and the step is taken from there. So an iteration has two batches, and the policy is an iterate after an even
    number of them: set `trainer.max_steps` and `trainer.val_check_interval` so.

    Between the two, checkpoints are larger by the weights and the optimizer's state.

    It is longer than the losses of other methods: it refuses what gives an iteration other steps, and goes on with a
    resumed run.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse options under which an iteration would have other steps than these two.

        Raises:
            InputError: Such an option is set, or the module is another one.
        """
        module, name = our_module(self, pl_module), "trainer.callbacks: Extragradient"
        if stage != "fit":
            return
        ahead = module.rollout is not None and (module.rollout.ahead > 0 or module.rollout.sync_every > 1)
        data = getattr(trainer, "datamodule", None)
        inert = {
            "model.updates_per_rollout and model.epochs_per_rollout, which must be 1": module.plan.step_count != 1,
            "model.buffer": module.buffer_options is not None,
            "ahead and sync_every of model.rollout": ahead,
            "data.preferences without prompts": getattr(data, "trains_on_pairs_alone", False),
            "a trainer.strategy that shards weights": module.device_mesh is not None,
        }
        for option, is_set in inert.items():
            if is_set:
                raise InputError(f"{name} steps once on what the policy has just written, which rules out {option}")
        if trainer.max_steps > 0 and trainer.max_steps % 2 and not is_fast_dev_run(trainer):
            raise InputError(f"{name} takes two steps an iteration; set trainer.max_steps to an even number")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the weights and the optimizer's state at the beginning of an iteration."""
        if batches_done(trainer) % 2 == 0:
            weights = Snapshot(our_module(self, pl_module).policy).weights
            self.before = {"weights": weights, "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()["state"])}

    def on_pairs_collected(self, trainer: Trainer, pl_module: XPOLightningModule, experience: Experience) -> None:
        """Go back to the iteration's beginning once the pairs of its second batch are written."""
        if batches_done(trainer) % 2:
            self._go_back(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back as well if the second batch was skipped, so that no pairs were collected."""
        if batches_done(trainer) % 2 == 0:
            self._go_back(trainer, our_module(self, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return what the second batch of the iteration under way goes back to."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.before = state_dict["before"]

    @torch.no_grad()
    def _go_back(self, trainer: Trainer, module: XPOLightningModule) -> None:
        if self.before is None:
            return
        weights, optimizer = self.before["weights"], trainer.optimizers[0]
        for name, weight in module.policy.named_parameters():
            if name in weights:
                weight.copy_(weights[name])
        # The settings stay: the schedule has set the learning rate of this step.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": self.before["optimizer"], "param_groups": groups})
        self.before = None
        module.run_state.changed = batches_done(trainer)  # No checkpoint until the step is taken.
