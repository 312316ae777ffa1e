"""Sets up a trainer as `Trainer.fit` does before it loads the models, without starting a logger."""

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from xpo_lightning.core.errors import InputError
from xpo_lightning.strategies import FSDP2Strategy


def shards_weights(trainer: Trainer) -> bool:
    """Tell whether the run will spread weights over processes."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def attach(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """Connect the trainer, the module and the data, and check that they fit together.

    One process checks the run, however many it will have, so no other is launched.

    Raises:
        InputError: The strategy says nothing before its processes have met.
    """
    if shards_weights(trainer) and not isinstance(trainer.strategy, FSDP2Strategy):
        raise InputError(
            "trainer.strategy: a check has one process, and Lightning's own ModelParallelStrategy says nothing before "
            "all of them have met; use FSDP2Strategy"
        )
    trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    limits = (trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs)
    loop = trainer.fit_loop
    loop.min_epochs, loop.max_epochs = _parse_loop_limits(*limits, trainer)
    trainer._callback_connector._attach_model_callbacks()
    _verify_loop_configurations(trainer)


def set_up_data(trainer: Trainer) -> None:
    """Read and check all prompts."""
    call._call_lightning_datamodule_hook(trainer, "setup", stage=TrainerFn.FITTING)


def set_up_callbacks(trainer: Trainer) -> None:
    """Run the `setup` hooks of the callbacks and the module, which refuse what they do not support."""
    call._call_callback_hooks(trainer, "setup", stage=TrainerFn.FITTING)
    call._call_lightning_module_hook(trainer, "setup", stage=TrainerFn.FITTING)


def set_up_loaders(trainer: Trainer) -> None:
    """Set up the data loaders, which counts the batches of an epoch and checks the validation's interval."""
    trainer.fit_loop.setup_data()
    if trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
