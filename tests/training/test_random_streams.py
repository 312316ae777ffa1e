"""Validation draws its own random numbers: it must not see the samples that the policy trains on."""

import lightning.pytorch as pl
from conftest import PROMPTS, loader, quiet_trainer

from xpo_lightning import Experience


class Written(pl.Callback):
    """Keeps the pairs of training and those of validation."""

    def __init__(self) -> None:
        self.training: list[Experience] = []
        self.validation: list[Experience] = []

    def on_pairs_collected(self, trainer, module, experience) -> None:
        self.training.append(experience)

    def on_validation_batch_end(self, trainer, module, outputs, *_) -> None:
        self.validation.append(outputs)


def test_validation_and_training_sample_the_same_prompts_differently(make_module):
    """At a rate of 0 the policy stays as it is, so that equal numbers would give equal completions."""
    module, written = make_module(learning_rate=0.0), Written()
    trainer = quiet_trainer(callbacks=[written], num_sanity_val_steps=0, max_epochs=2)
    trainer.fit(module, loader(PROMPTS), loader(PROMPTS))
    first, second = (pairs.completions.by_policy.texts for pairs in written.training)
    held_out, again = (pairs.completions.by_policy.texts for pairs in written.validation)
    assert held_out == again
    assert len({first, second, held_out}) == 3
