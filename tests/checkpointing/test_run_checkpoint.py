"""When checkpoints are written, and what a module can be made of."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, longer_is_better, quiet_trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader

from xpo_lightning import (
    InputError,
    LoRASpec,
    ModelSpec,
    PromptDataModule,
    PythonReward,
    ReferenceRefresh,
    XPOLightningModule,
)
from xpo_lightning.callbacks import GracefulStop, RunCheckpoint
from xpo_lightning.core.fault_tolerance.guard import StopAsked

MakeModule = Callable[..., XPOLightningModule]


def saved(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.ckpt"))


def trained(module: XPOLightningModule, *callbacks: Callback, **options: Any) -> None:
    loader = DataLoader([*PROMPTS, *PROMPTS], batch_size=2, collate_fn=list)
    quiet_trainer(callbacks=[*callbacks], enable_checkpointing=True, max_steps=8, **options).fit(module, loader)


def test_a_batch_of_several_steps_that_passes_over_a_multiple_is_saved(make_module: MakeModule, tmp_path: Path):
    callback = RunCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trained(make_module(updates_per_rollout=2), callback)
    assert saved(tmp_path) == ["step=4", "step=6"]


def test_an_interval_of_time_is_honoured_and_refused_where_it_would_be_ignored(make_module: MakeModule, tmp_path: Path):
    options: dict[str, Any] = {"dirpath": tmp_path, "filename": "{step}", "save_top_k": -1}
    trained(make_module(), RunCheckpoint(**options, train_time_interval=timedelta(0)), limit_train_batches=2)
    assert {"step=1", "step=2"} <= set(saved(tmp_path))
    with pytest.raises(InputError, match=r"ModelCheckpoint ignores train_time_interval .* use RunCheckpoint"):
        trained(make_module(), ModelCheckpoint(**options, train_time_interval=timedelta(0)))


def test_a_checkpoint_that_is_due_with_a_validation_holds_what_it_measured(make_module: MakeModule, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "the cat sat on mat {n}"}}\n' for n in range(10)))
    callback = RunCheckpoint(tmp_path, "{step}", "eval/win_rate", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(
        callbacks=[callback], enable_checkpointing=True, val_check_interval=2, num_sanity_val_steps=0
    )
    trainer.fit(make_module(), datamodule=PromptDataModule(str(prompts), batch_size=2, validation_size=2))
    assert saved(tmp_path) == ["step=2", "step=4"]
    for step in (2, 4):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["xpo_run"]
        assert "eval/win_rate" in state["metrics"]
        assert (state["validate"], state["validated"]) == (False, step)


def test_a_module_is_made_of_a_checkpoint(make_module: MakeModule, model_folder: Callable[..., str], tmp_path: Path):
    module = make_module(learning_rate=1e-2)
    trained(module, RunCheckpoint(tmp_path, every_n_train_steps=1, save_last=True))
    options: dict[str, Any] = {"policy": ModelSpec(model_folder()), "reward": PythonReward(longer_is_better)}
    loaded = XPOLightningModule.load_from_checkpoint(tmp_path / "last.ckpt", **options)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_weight_averaging_that_would_average_nothing_is_refused(make_module: MakeModule) -> None:
    with pytest.raises(InputError, match=r"StochasticWeightAveraging copies the module .* use EMAWeightAveraging"):
        trained(make_module(), StochasticWeightAveraging(1e-3))


def test_the_last_checkpoint_is_of_the_last_validation_also_if_it_is_none_of_the_best(
    make_module: MakeModule, tmp_path: Path
) -> None:
    held: dict[int, int] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            file = tmp_path / "last.ckpt"
            held[trainer.global_step] = torch.load(file, weights_only=True)["global_step"] if file.exists() else 0

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: XPOLightningModule) -> None:
            pl_module.log("quality", -float(trainer.global_step))

    batches = DataLoader(PROMPTS * 2, batch_size=2, collate_fn=list)
    saving = RunCheckpoint(tmp_path, "{step}", monitor="quality", mode="max", save_last=True)
    often = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 8, "max_epochs": -1}
    trainer = quiet_trainer(callbacks=[Watch(), saving], enable_checkpointing=True, **often)
    trainer.fit(make_module(), batches, batches)
    assert held == {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6}
    assert saved(tmp_path) == ["last", "step=2"]


@pytest.mark.parametrize(
    ("options", "interval"), [({}, 2), ({"every_n_train_steps": 2}, 2), ({}, 1.0)], ids=["validation", "steps", "epoch"]
)
def test_a_checkpoint_whose_validation_was_stopped_is_saved_after_it(
    make_module: MakeModule, tmp_path: Path, options: dict[str, Any], interval: float
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "the cat {number}"}}\n' for number in range(12)))

    class Stop(Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

    def run(folder: Path, stop: int = -1, resume: Path | None = None) -> dict[str, float]:
        saving = RunCheckpoint(folder, "{step}", monitor="eval/objective/model_scores", save_top_k=-1, **options)
        trainer = quiet_trainer(
            callbacks=[saving, GracefulStop(), Stop(stop)],
            enable_checkpointing=True,
            max_epochs=2,
            num_sanity_val_steps=0,
            val_check_interval=interval,
            default_root_dir=folder,
        )
        pl.seed_everything(1, verbose=False)
        data = PromptDataModule(str(source), batch_size=2, validation_size=4)
        with pytest.raises(StopAsked) if stop > 0 else nullcontext():
            trainer.fit(make_module(learning_rate=1e-2), datamodule=data, ckpt_path=resume)
        return {Path(file).name: float(score) for file, score in saving.best_k_models.items()}

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop=4)
    assert run(tmp_path / "stopped", resume=tmp_path / "stopped" / "stopped.ckpt") == whole


def test_a_file_that_would_be_in_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    name = "{step}-{eval/win_rate:.2f}"
    with pytest.raises(InputError, match=rf"RunCheckpoint\.filename '{re.escape(name)}'.* auto_insert_metric_name"):
        RunCheckpoint(tmp_path, name, monitor="eval/win_rate")
    RunCheckpoint(tmp_path, name, monitor="eval/win_rate", auto_insert_metric_name=False)


def test_moving_average_ends_with_the_averaged_weights(make_module: MakeModule, tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: XPOLightningModule, *_: object) -> None:
            seen.append([weight.detach().clone() for weight in pl_module.trained_parameters()])

    module = make_module()
    trained(module, EMAWeightAveraging(decay=0.5), Watch(), default_root_dir=tmp_path)
    average = seen[0]
    for weights in seen[1:]:
        average = [0.5 * old + 0.5 * new for old, new in zip(average, weights, strict=True)]
    assert any(not torch.equal(*both) for both in zip(average, seen[-1], strict=True))
    torch.testing.assert_close(list(module.trained_parameters()), average, check_stride=False)


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoRASpec(r=2), "reference_refresh": ReferenceRefresh(3)}], ids=["all weights", "LoRA"]
)
def test_moving_average_resumes_exactly(make_module: MakeModule, tmp_path: Path, options: dict[str, Any]) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "the cat {number}"}}\n' for number in range(10)))

    def run(resume: Path | None = None) -> list[Tensor]:
        module = make_module(learning_rate=1e-2, **options)
        saving = RunCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        averaging: Callback = EMAWeightAveraging(decay=0.5)
        trainer = quiet_trainer(callbacks=[averaging, saving], enable_checkpointing=True, max_epochs=2)
        pl.seed_everything(1, verbose=False)
        trainer.fit(module, datamodule=PromptDataModule(str(source), batch_size=2, validation_size=2), ckpt_path=resume)
        return [weight.detach().clone() for weight in module.trained_parameters()]

    whole = run()
    for one, other in zip(whole, run(tmp_path / "step=3.ckpt"), strict=True):
        assert torch.equal(one, other)
