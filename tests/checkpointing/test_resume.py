"""A run that is stopped and resumed ends as the run that was never stopped, bit for bit."""

import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import longer_is_better, quiet_trainer

from xpo_lightning import (
    BufferOptions,
    Candidates,
    Experience,
    InputError,
    LabelRule,
    LoRASpec,
    PerIteration,
    PolicySampler,
    PreviousPolicySampler,
    PromptDataModule,
    PythonReward,
    ReferenceRefresh,
    XPOLightningModule,
)

MakeModule = Callable[..., XPOLightningModule]


def noisy(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score with the global randomness of every library that a user might draw from."""
    lengths = longer_is_better(prompts, completions, columns)
    return [n + random.random() + np.random.random() + float(torch.rand(())) for n in lengths]


class Tape(pl.Callback):
    """Keeps all that was logged and sampled at each step; writes checkpoints, if a folder is given; may stop a run."""

    def __init__(self, folder: Path | None = None, stop: int | None = None) -> None:
        self.folder, self.stop = folder, stop
        self.logged: dict[int, dict[str, float]] = {}
        self.held_out: dict[int, dict[str, float]] = {}
        self.sampled: dict[int, list[Any]] = {}

    def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        both = experience.completions.map(lambda side: side.texts)
        self.sampled[trainer.global_step + 1] = [experience.prompts.raw, both.by_policy, both.by_sampler]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logged[trainer.global_step] = numbers_of(trainer)
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

        trainer.should_stop = trainer.should_stop or trainer.global_step == self.stop

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / "end.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.held_out[trainer.global_step] = numbers_of(trainer)

    def after(self, step: int) -> dict[str, dict[int, Any]]:
        """Return what was kept after a step; the validation of that step comes after it."""
        return {
            "logged": {number: kept for number, kept in self.logged.items() if number > step},
            "held out": {number: kept for number, kept in self.held_out.items() if number >= step},
            "sampled": {number: kept for number, kept in self.sampled.items() if number > step},
        }


def numbers_of(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def digest(module: XPOLightningModule, trainer: pl.Trainer) -> str:
    """Hash the weights, the optimizer, the learning rate and the global random state."""
    total, optimizer = hashlib.sha256(), trainer.optimizers[0].state_dict()
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    for tensor in [*module.state_dict().values(), *moments, torch.get_rng_state()]:
        total.update(tensor.detach().numpy().tobytes())
    schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    total.update(repr((optimizer["param_groups"], schedule, random.getstate(), np.random.get_state())).encode())
    return total.hexdigest()


Run = Callable[..., tuple[str, Tape]]


@pytest.fixture
def run(make_module: MakeModule, tmp_path: Path) -> Run:
    """Give a function that trains, from the beginning or from a checkpoint."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the cat sat on mat {n}"} for n in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit(folder: Path | None = None, resume: Path | None = None, **options: Any) -> tuple[str, Tape]:
        data = {"source": str(prompts), "batch_size": 2, "validation_size": 2, **options.pop("data", {})}
        trainer_options = {**TRAINER, **options.pop("trainer", {})}
        options = {"learning_rate": 1e-2, "warmup_ratio": 0.2, "lr_schedule": "cosine", **options}
        pl.seed_everything(options.pop("seed", 3), verbose=False)
        tape = Tape(folder, options.pop("stop", None))
        module = make_module(reward=PythonReward(noisy), **options)
        trainer = quiet_trainer(callbacks=[tape], default_root_dir=tmp_path, **trainer_options)
        trainer.fit(module, datamodule=PromptDataModule(**data), ckpt_path=resume)
        return digest(module, trainer), tape

    return fit


TRAINER: dict[str, Any] = {
    "max_epochs": 2,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
}
WITHOUT_VALIDATION = {"validation_size": 0, "max_prompts": 6}
CASES: dict[str, dict[str, Any]] = {
    "all weights, validation, micro-batches of 1": {"micro_batch_size": 1},
    "all weights, no validation, micro-batches of 3": {"micro_batch_size": 3, "data": WITHOUT_VALIDATION},
    "LoRA, validation, micro-batches of 3": {"lora": LoRASpec(r=2, dropout=0.3), "micro_batch_size": 3},
    "LoRA, no validation, micro-batches of 1": {
        "lora": LoRASpec(r=2, dropout=0.3),
        "micro_batch_size": 1,
        "data": WITHOUT_VALIDATION,
    },
    "max_steps": {"trainer": {"max_steps": 5, "max_epochs": -1}},
    "validation at the end of epochs": {"trainer": {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}},
    "reference cache": {"reference_cache": "memory"},
    "several updates": {"updates_per_rollout": 2},
    "stream": {
        "data": {**WITHOUT_VALIDATION, "streaming": True, "shuffle_buffer": 3},
        "trainer": {"max_steps": 6, "max_epochs": -1},
    },
    "a part of each epoch": {"trainer": {"limit_train_batches": 2, "max_epochs": 3}},
    "all pairs, in memory": {"buffer": BufferOptions(), "epochs_per_rollout": 2},
    "all pairs, from the third batch on in a file": {"buffer": BufferOptions(memory_pairs=5), "updates_per_rollout": 2},
    "the pairs of two batches": {"buffer": BufferOptions(keep=2)},
    "the pairs of two batches, in a file": {
        "buffer": BufferOptions(keep=2, memory_pairs=3),
        "data": WITHOUT_VALIDATION,
    },
    "the policy against itself of before": {"sampler": PreviousPolicySampler(every=2)},
    "the policy against itself": {
        "sampler": PolicySampler(),
        "candidates": Candidates(3, "best_and_worst"),
        "labels": LabelRule(rule="bradley_terry", flip=0.2, min_margin=0.1),
    },
    "a reference that follows": {"reference_refresh": ReferenceRefresh(every=2)},
    "a reference that follows slowly, with LoRA": {
        "reference_refresh": ReferenceRefresh(every=1, mix=0.3),
        "lora": LoRASpec(r=2, dropout=0.3),
    },
    "another alpha in each iteration": {"alpha": PerIteration([0.3, 0.2, 0.0], batches=2), "alpha_in_beta": True},
    "another scheduler": {
        "lr_schedule": None,
        "warmup_ratio": 0.0,
        "lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=10),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_step_resumes_exactly(run: Run, tmp_path: Path, case: str):
    expected, whole = run(tmp_path, **CASES[case])
    assert len(whole.logged) >= 5
    for step in whole.logged:
        found, rest = run(resume=tmp_path / f"{step}.ckpt", **CASES[case])
        assert rest.after(step) == whole.after(step), step
        assert found == expected, step


EXTENDED: dict[str, dict[str, Any]] = {
    "a file": {},
    "a stream": CASES["stream"],
    "a part of each epoch": {"trainer": {"limit_train_batches": 2}},
    "all pairs": {"buffer": BufferOptions(), "updates_per_rollout": 2},
}


@pytest.mark.parametrize("case", ["a file", *(pytest.param(case, marks=pytest.mark.slow) for case in [*EXTENDED][1:])])
def test_a_run_that_ended_amid_an_epoch_is_extended_exactly(run: Run, tmp_path: Path, case: str):
    """Epochs have 2 or 3 batches. A run ends after its steps, or as a callback says, and a longer one goes on."""

    def until(ends: dict[str, Any], *folders: Path | None, stop: int | None = None) -> tuple[str, Tape]:
        options = {**EXTENDED[case], "lr_schedule": "constant", "warmup_ratio": 0.0, "stop": stop}
        at_ends = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
        return run(*folders, **options | {"trainer": {**options.get("trainer", {}), **at_ends, **ends}})

    end = {"max_steps": 8, "max_epochs": -1}
    expected, whole = until(end)
    for steps, stop in ((2, None), (4, None), (6, None), (2, 2)):
        until({"max_epochs": 4} if stop else {"max_steps": steps, "max_epochs": -1}, tmp_path, stop=stop)
        found, rest = until(end, None, tmp_path / "end.ckpt")
        assert found == expected
        assert rest.after(steps)["sampled"] == whole.after(steps)["sampled"]
        for step in (step for step in whole.logged if step > steps):
            assert trained(rest.logged[step]) == trained(whole.logged[step])


def trained(numbers: dict[str, float]) -> dict[str, float]:
    """Return the numbers of a training step; those of the last validation stand beside them."""
    return {name: value for name, value in numbers.items() if not name.startswith("eval/")}


# ---- changed settings ----


@pytest.mark.slow
def test_changed_settings_are_those_of_the_resumed_run(run: Run, tmp_path: Path):
    run(tmp_path)
    options = {"learning_rate": 3e-2, "lr_schedule": "constant", "warmup_ratio": 0.0, "alpha": 0.25, "beta": 0.7}
    _, rest = run(resume=tmp_path / "3.ckpt", **options)
    for step in (4, 5, 6):
        for name, value in {"lr": 3e-2, "alpha": 0.25, "beta": 0.7}.items():
            assert rest.logged[step][name] == pytest.approx(value)
    _, more = run(resume=tmp_path / "6.ckpt", trainer={"max_epochs": 3})
    assert sorted(more.logged) == [7, 8, 9]
    _, other = run(resume=tmp_path / "3.ckpt", seed=4)
    assert rest.sampled[4][0] == other.sampled[4][0]
    assert rest.sampled[4][1:] != other.sampled[4][1:]


@pytest.mark.slow
def test_changed_settings_of_the_optimizer_are_those_of_the_resumed_run(run: Run, tmp_path: Path):
    options: dict[str, Any] = {"learning_rate": None}
    run(tmp_path, **options, optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    steps = [tmp_path / "4.ckpt", tmp_path / "changed"]
    steps[1].mkdir()
    run(
        steps[1], steps[0], **options, optimizer=partial(torch.optim.AdamW, lr=2e-2, weight_decay=0.3, betas=(0.5, 0.6))
    )
    (group,) = torch.load(steps[1] / "5.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.3, (0.5, 0.6), 2e-2)


STREAM = {**WITHOUT_VALIDATION, "streaming": True}
ONE_CYCLE = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=10)
UNSHAPED: dict[str, Any] = {"lr_schedule": None, "warmup_ratio": 0.0}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {},
            {"learning_rate": None, "optimizer": partial(torch.optim.SGD, lr=0.1)},
            r"model\.optimizer\.class",
        ),
        ({}, {"lora": LoRASpec(r=2)}, "does not belong to this model"),
        ({}, {**UNSHAPED, "lr_scheduler": ONE_CYCLE}, r"model\.lr_scheduler"),
        (
            {**UNSHAPED, "lr_scheduler": ONE_CYCLE},
            {**UNSHAPED, "lr_scheduler": partial(ONE_CYCLE, total_steps=20)},
            r"model\.lr_scheduler\.total_steps \(10 there, 20 now\)",
        ),
        (
            {},
            {"sampler": PreviousPolicySampler()},
            r"model\.sampler is Previous.* made with Reference",
        ),
        ({}, {"buffer": BufferOptions()}, r"made without model\.buffer, and the configuration is with it"),
        ({"buffer": BufferOptions()}, {}, r"made with model\.buffer, and the configuration is without it"),
        ({}, {"reference_refresh": ReferenceRefresh(1)}, r"made without model\.reference_refresh"),
        ({}, {"data": {"batch_size": 4}}, r"data\.batch_size \(2 there, 4 now\)"),
        ({}, {"data": {"seed": 9}}, r"data\.seed \(0 there, 9 now\)"),
        ({}, {"data": {"shuffle": False}}, r"data\.shuffle \(True there, False now\)"),
        ({}, {"data": {"max_prompts": 5}}, r"data\.prompts \(6 there, 5 now\)"),
        ({}, {"data": {"max_prompt_tokens": 3, "truncate": "left"}}, r"data\.token_ids"),
        ({"data": STREAM}, {"data": {**STREAM, "max_prompts": 5}}, r"data\.stream\.max_prompts \(6 there, 5 now\)"),
    ],
)
def test_changed_settings_that_cannot_be_honoured_are_refused(
    run: Run, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str
):
    run(tmp_path, **before, trainer={"max_steps": 1})
    with pytest.raises(InputError, match=message):
        run(resume=tmp_path / "1.ckpt", **after)


def test_another_number_of_processes_is_refused(run: Run, tmp_path: Path):
    run(tmp_path, trainer={"max_steps": 1})
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    saved["xpo_run"]["processes"] *= 2
    torch.save(saved, tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="made by 2 processes, and now there is 1"):
        run(resume=tmp_path / "two.ckpt")


@pytest.mark.slow
def test_a_cache_in_a_folder_loses_what_was_written_after_the_checkpoint(run: Run, tmp_path: Path):
    options = {"reference_cache": str(tmp_path / "cache")}
    expected, whole = run(tmp_path, **options)
    found, rest = run(resume=tmp_path / "2.ckpt", **options)
    assert rest.after(2) == whole.after(2)
    assert found == expected
