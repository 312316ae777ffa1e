"""All that a check has found out of a run."""

from dataclasses import dataclass

from torch.optim import Optimizer

from xpo_lightning.checking.dry_step import DryStep
from xpo_lightning.checking.folders import Disk
from xpo_lightning.checking.measuring import Meter
from xpo_lightning.checking.survey import Survey
from xpo_lightning.footprint.estimate import Footprint


@dataclass(frozen=True)
class RewardRows:
    """Prompts with room for a completion, as a reward model reads them.

    Args:
        read: Prompts that were looked at.
        too_long: Those that leave no room for a completion of `model.sampling.max_new_tokens`.
        limit: Tokens that the reward model takes; None is no limit.
    """

    read: int
    too_long: int
    limit: int | None


@dataclass(frozen=True)
class Findings:
    """What a check has found.

    Args:
        survey: The data.
        steps: Optimizer steps of the run; None where it has no known end.
        processes: Processes of the run; one was tried out.
        reward_rows: What each reward model reads.
        optimizer: The optimizer, which has taken no step.
        step: The dry step.
        meter: Seconds and memory of the parts: `data`, `models`, `dry step`.
        dry: What the dry step should have taken; None for architectures that nobody can tell it of.
        whole: What a step of the run takes; None as above.
        memory: Bytes that the device has; None where nobody knows.
        disk: Where checkpoints go; None is nowhere.
    """

    survey: Survey
    steps: int | None
    processes: int
    reward_rows: list[RewardRows]
    optimizer: Optimizer
    step: DryStep
    meter: Meter
    dry: Footprint | None
    whole: Footprint | None
    memory: int | None
    disk: Disk | None
