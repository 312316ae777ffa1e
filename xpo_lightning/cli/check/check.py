"""`xpo check`: tries a run out before it is started, without training and without leaving a file."""

from lightning.pytorch import Trainer

from xpo_lightning.callbacks.base import print_line
from xpo_lightning.cli.check.advice import warnings_of
from xpo_lightning.cli.check.dry_step import dry_step, prompts_wanted
from xpo_lightning.cli.check.meter import Meter, memory_of
from xpo_lightning.cli.check.report import Findings, report_lines
from xpo_lightning.cli.check.requirements import (
    check_folders,
    check_loaded,
    check_room,
    check_servers,
    check_validation,
    disk,
)
from xpo_lightning.cli.check.survey import reward_rows, survey
from xpo_lightning.cli.check.trainer_setup import attach, set_up_callbacks, set_up_data, set_up_loaders, shards_weights
from xpo_lightning.data import PromptDataModule
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.memory.run_plan import memory_of_run, rewards_with_models, standing_memory
from xpo_lightning.training.optimizer import WarmupThenDecay, total_steps

SAMPLES = 256
"""Prompts to check with reward models' tokenizers: the longest, and others spread evenly over the data."""


class CheckingTrainer(Trainer):
    """Lightning's trainer, which can also check a run before it is started."""

    def check(
        self,
        model: XPOLightningModule,
        datamodule: PromptDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Look for problems that would stop a run, without training and without leaving a file.

        It reads all prompts, loads all models, and takes a few prompts through a step up to its gradient. Then it
        prints what the run will need, and which settings are probably mistakes. One process does so, however many the
        run will have.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: Must be null: the check covers a run that starts from its beginning.
            weights_only: Has no effect without a checkpoint.

        Raises:
            InputError: The run cannot be started, or would be stopped by its first step.
        """
        try:
            found = check_run(self, model, datamodule)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            model.teardown("fit")
        for line in report_lines(model, found, warnings_of(model, found)):
            print_line(line)
        print_line("The run can start.")


def check_run(trainer: Trainer, module: XPOLightningModule, data: PromptDataModule) -> Findings:
    """Do everything that a run does before its first optimizer step; leave nothing behind but loaded models.

    Raises:
        InputError: The run cannot be started, or would be stopped by its first step.
    """
    meter = Meter(trainer.strategy.root_device)
    attach(trainer, module, data)
    check_folders(trainer, module.reference_cache)
    with meter("data"):
        set_up_data(trainer)
    set_up_callbacks(trainer)
    check_validation(trainer, data.has_validation)
    set_up_loaders(trainer)
    surveyed = survey(trainer, data, SAMPLES)
    check_servers(module.reward)
    memory = memory_of(trainer.strategy.root_device)
    meter.start()
    with meter("models"):
        module.configure_model()
        fits = (
            not shards_weights(trainer)
            or memory is None
            or sum(weight.nbytes for weight in module.parameters()) < memory
        )
        if fits:
            module.to(trainer.strategy.root_device)
        module.sampler.begin(module.policy)
        module.reference.begin()
    check_loaded(trainer, module)
    optimizer, scheduler = module.optimization.build(module.trained_parameters())
    steps = total_steps(trainer, module.plan.step_count)
    if isinstance(scheduler, WarmupThenDecay):
        scheduler.begin(steps)
    samples, wanted = surveyed.training.samples, prompts_wanted(module)
    rows = [reward_rows(part, samples, module.sampling.max_new_tokens) for part in rewards_with_models(module)]
    whole = memory_of_run(
        module,
        optimizer,
        batch_size=data.batching.size,
        longest=surveyed.training.longest,
        computes_in_bfloat16=trainer.precision == "bf16-mixed",
    )
    standing, place = standing_memory(module, optimizer), disk(trainer)
    check_room(place, standing.checkpoint)
    step = None
    if fits:
        with meter("dry step"):
            step = dry_step(module, trainer, samples[:: max(1, len(samples) // wanted)][:wanted])
    return Findings(
        survey=surveyed,
        steps=steps,
        processes=trainer.world_size,
        reward_rows=rows,
        optimizer=optimizer,
        step=step,
        meter=meter,
        standing=standing,
        whole=whole,
        memory=memory,
        disk=place,
    )
