"""What an XPO run asks of the trainer."""

import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from xpo_lightning.errors import InputError


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would touch more than the policy, and silence what Lightning cannot know to be meant.

    Raises:
        InputError: `trainer.precision` would convert the reward's weights as well, or a checkpoint callback has an
            option that it would ignore.
    """
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise InputError(
            f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed, and "
            f"model.policy.dtype for the type of the weights (other settings would convert the reward as well)"
        )
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is ModelCheckpoint and callback._train_time_interval is not None:
            raise InputError(
                "trainer.callbacks: Lightning's ModelCheckpoint ignores train_time_interval where a module takes its "
                "optimizer steps itself, as this one does; use RunCheckpoint, which has the same options"
            )
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
