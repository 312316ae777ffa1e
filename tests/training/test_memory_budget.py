"""Where no option limits a micro-batch, the first step measures how many tokens fit in a GPU's memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly, quiet_trainer

from xpo_lightning import PromptDataModule, XPOLightningModule
from xpo_lightning.training import memory_budget

MakeModule = Callable[..., XPOLightningModule]
MIB = 2**20


class Passes(pl.Callback):
    """Counts the backward passes of each step, and may save checkpoints."""

    def __init__(self, folder: Path | None = None) -> None:
        self.counts: list[int] = []
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(0)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        self.counts[-1] += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let a CPU count its memory: 100 MiB stay, micro-batches took 2 more, and the device has so much left."""
    left = {"bytes": 0}
    monkeypatch.setattr(memory_budget, "COUNTING", {"cpu"})
    for name, value in {
        "reset_peak_memory_stats": None,
        "memory_allocated": 100 * MIB,
        "max_memory_allocated": 102 * MIB,
        "memory_reserved": 110 * MIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left["bytes"], 1000 * MIB))
    return left


def test_the_first_step_finds_how_many_tokens_fit(free: dict[str, int]):
    measured = memory_budget.MemoryBudget(torch.device("cpu"))
    measured.after_gradients()
    free["bytes"] = 70 * MIB  # and 10 that are reserved and not used: half of it is 20 times what 300 tokens took
    assert measured.tokens(300) == 4096  # the power of two below 6000
    free["bytes"] = 0
    assert measured.tokens(300) == 512  # 2.5 times
    free["bytes"] = -10 * MIB
    assert measured.tokens(300) == 300  # nothing is left: as before
    free["bytes"] = 2**40
    assert measured.tokens(300) == 2**15


def test_later_steps_take_more_pairs_together_and_do_the_same(make_module: MakeModule, free: dict[str, int]):
    free["bytes"] = 500 * MIB

    def trained(**options: Any) -> tuple[list[int], Recorder]:
        torch.manual_seed(0)
        passes, recorder = Passes(), Recorder()
        fit_quietly(
            make_module(learning_rate=1e-3, **options),
            PROMPTS * 8,
            batch_size=20,
            max_steps=2,
            callbacks=[passes, recorder],
        )
        return passes.counts, recorder

    counts, recorder = trained()
    fixed, expected = trained(micro_batch_size=8)
    assert counts == [3, 1]
    assert fixed == [3, 3]
    assert recorder.of("loss/total") == pytest.approx(expected.of("loss/total"), abs=1e-5)
    assert trained(micro_batch_tokens=10_000)[0] == [1, 1]


def test_a_resumed_run_takes_as_many_as_before(make_module: MakeModule, tmp_path: Path, free: dict[str, int]):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join('{"prompt": "' + prompt + '"}\n' for prompt in PROMPTS * 8))

    def run(passes: Passes, resume: Path | None = None) -> list[int]:
        pl.seed_everything(3, verbose=False)
        trainer = quiet_trainer(max_steps=2, callbacks=[passes])
        trainer.fit(make_module(), datamodule=PromptDataModule(str(source), batch_size=20), ckpt_path=resume)
        return passes.counts

    free["bytes"] = 500 * MIB
    assert run(Passes(tmp_path)) == [3, 1]
    free["bytes"] = 0  # whatever else is on the device by then
    assert run(Passes(), tmp_path / "1.ckpt") == [1]
