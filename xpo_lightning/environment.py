"""What an XPO run asks of the trainer."""

import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xpo_lightning.errors import InputError


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would touch more than the policy, and silence what Lightning cannot know to be meant.

    Raises:
        InputError: `trainer.precision` would convert the reward's weights as well.
    """
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise InputError(
            f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed, and "
            f"model.policy.dtype for the type of the weights (other settings would convert the reward as well)"
        )
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


def has_begun(trainer: Trainer) -> bool:
    """Tell whether training is under way, the sanity check before it done."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
