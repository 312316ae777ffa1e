"""What a run remembers of the batches that it has finished, beside the weights that it trains."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.reference import Reference
from xpo_lightning.rollout.reference_cache import ReferenceCache
from xpo_lightning.rollout.samplers import Sampler
from xpo_lightning.training.replay_buffer.buffer import Buffer


@dataclass
class PersistentState:
    """Holds all that checkpoints must have of it.

    Args:
        reference: May have been refreshed.
        sampler: May know earlier states of the policy.
        cache: What the reference wrote; None where it is not kept.
        buffer: Pairs of earlier batches; None where they are not kept.
    """

    reference: Reference
    sampler: Sampler
    cache: ReferenceCache | None = None
    buffer: Buffer | None = None

    def after_batch(self, batches: int, policy: nn.Module, *, taken: bool) -> None:
        """Take note that a batch is finished.

        Args:
            batches: Batches that the run has finished.
            policy: The policy, as it is now.
            taken: Whether an optimizer step was taken on it; what came of one that was left out is not kept.
        """
        if self.buffer is not None and taken:
            self.buffer.settle()
        if self.cache is not None:
            self.cache.settle(keep=taken)
        self.sampler.after_batch(batches, policy)
        self.reference.after_batch(batches)

    def of_process(self) -> dict[str, Any]:
        """Return what is this process's own: plain values and tensors."""
        return {
            "cache": None if self.cache is None else self.cache.state(),
            "buffer": None if self.buffer is None else self.buffer.state(),
        }

    def shared(self) -> dict[str, Any]:
        """Return what is the same in every process, as the weights of earlier policies: plain values and tensors."""
        refreshed = self.reference.refreshed
        return {
            "sampler": self.sampler.state(),
            "reference": None if refreshed is None else refreshed.state(),
            "cache": {} if self.cache is None else self.cache.shared_state(),
        }

    def load(self, own: dict[str, Any], shared: dict[str, Any]) -> None:
        """Go back to what `of_process` and `shared` returned.

        Raises:
            InputError: Something that is needed is not there, or cannot be gone on with.
        """
        if self.cache is not None and own["cache"] is not None:
            self.cache.load_state({**own["cache"], **shared.get("cache", {})})
        for option, there, now in (
            ("model.buffer", own["buffer"], self.buffer),
            ("model.reference_refresh", shared["reference"], self.reference.refreshed),
        ):
            if (there is None) != (now is None):
                raise InputError(
                    f"ckpt_path: the checkpoint was made {'without' if there is None else 'with'} {option}, and the "
                    f"configuration is {'without' if now is None else 'with'} it; resume as the run was started"
                )
        if self.buffer is not None:
            self.buffer.load_state(own["buffer"])
        self.sampler.load_state(shared["sampler"])
        if self.reference.refreshed is not None:
            self.reference.refreshed.load_state(shared["reference"], "model.reference_refresh")
