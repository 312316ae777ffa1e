"""When checkpoints are written, and what a module can be made of."""

from collections.abc import Callable
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
from xpo_lightning.callbacks import RunCheckpoint

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
