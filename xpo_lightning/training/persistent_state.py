"""The state that a run carries from batch to batch, besides the weights that it trains."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus
from xpo_lightning.models.reference import Reference
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.reference_cache import ReferenceCache
from xpo_lightning.rollout.samplers import Sampler
from xpo_lightning.training.replay_buffer.buffer import Buffer


@dataclass
class PersistentState:
    """Holds the parts of a run that have state, and saves and restores them for checkpoints.

    Args:
        reference: The reference, which may have been refreshed.
        sampler: The sampler, which may keep earlier versions of the policy.
        bonus: The exploration bonus, which may learn.
        bonus_sampler: The sampler of the exploration term's own completions; None if it has none.
        cache: Cache of the reference's completions; None for no cache.
        buffer: Replay buffer of earlier batches' pairs; None for no buffer.
        writer: Has an engine write, with weights that may be behind the policy; None if there is no engine.
    """

    reference: Reference
    sampler: Sampler
    bonus: Bonus
    bonus_sampler: Sampler | None = None
    cache: ReferenceCache | None = None
    buffer: Buffer | None = None
    writer: EngineWriter | None = None

    def begin(self, policy: nn.Module) -> None:
        """Let the samplers record what they need of the policy before training."""
        for sampler in self._samplers().values():
            sampler.begin(policy)
        if self.writer is not None:
            self.writer.begin(policy)

    def after_batch(self, batches: int, policy: nn.Module, *, taken: bool) -> None:
        """Update each part after a finished batch.

        Args:
            batches: Batches that the run has finished.
            policy: The policy after this batch.
            taken: Whether an optimizer step was taken on the batch; the pairs and completions of a skipped one are not
                kept.
        """
        if self.buffer is not None and taken:
            self.buffer.settle()
        if self.cache is not None:
            self.cache.settle(keep=taken)
        if self.writer is not None:
            self.writer.settle()
        for sampler in self._samplers().values():
            sampler.after_batch(batches, policy)
        self.reference.after_batch(batches)

    def of_process(self) -> dict[str, Any]:
        """Return the state that each rank has for itself: plain values and tensors."""
        return {
            "cache": None if self.cache is None else self.cache.state(),
            "buffer": None if self.buffer is None else self.buffer.state(),
        }

    def shared(self) -> dict[str, Any]:
        """Return the state that all ranks share, such as the weights of earlier policies: plain values and tensors."""
        refreshed = self.reference.refreshed
        return {
            **{name: sampler.state() for name, sampler in self._samplers().items()},
            "bonus": self.bonus.state(),
            "reference": None if refreshed is None else refreshed.state(),
            "cache": {} if self.cache is None else self.cache.shared_state(),
            "engine": None if self.writer is None else self.writer.state(),
        }

    def load(self, own: dict[str, Any], shared: dict[str, Any]) -> None:
        """Restore the states that `of_process` and `shared` returned.

        Raises:
            InputError: The checkpoint was made with other options, or lacks something that is needed.
        """
        if self.cache is not None and own["cache"] is not None:
            self.cache.load_state({**own["cache"], **shared.get("cache", {})})
        for option, there, now in (
            ("model.buffer", own["buffer"], self.buffer),
            ("model.reference_refresh", shared["reference"], self.reference.refreshed),
            ("model.bonus_sampler", shared.get("bonus_sampler"), self.bonus_sampler),
        ):
            if (there is None) != (now is None):
                raise InputError(
                    f"ckpt_path: the checkpoint was made {'without' if there is None else 'with'} {option}, and the "
                    f"configuration is {'without' if now is None else 'with'} it; resume as the run was started"
                )
        if self.buffer is not None:
            self.buffer.load_state(own["buffer"])
        for name, sampler in self._samplers().items():
            sampler.load_state(shared[name])
        self._load_bonus(shared.get("bonus"))
        if self.writer is not None:
            self.writer.load_state(shared.get("engine"))
        if self.reference.refreshed is not None:
            self.reference.refreshed.load_state(shared["reference"], "model.reference_refresh")

    def _samplers(self) -> dict[str, Sampler]:
        """Return the samplers by the names that their states have in a checkpoint."""
        third = {} if self.bonus_sampler is None else {"bonus_sampler": self.bonus_sampler}
        return {"sampler": self.sampler, **third}

    def _load_bonus(self, state: dict[str, Any] | None) -> None:
        """Restore the bonus's state; one that does not learn has none, and may be exchanged."""
        now, there = type(self.bonus).__name__, "XPOBonus" if state is None else state["class"]
        if self.bonus.learns and there != now:
            raise InputError(
                f"model.bonus is {now}, which learns from each batch, and the checkpoint was made with {there}, so "
                f"that what it had learned is not known; resume with that, or begin a new run from the exported policy"
            )
        if state is not None and there == now:
            self.bonus.load_state(state)
