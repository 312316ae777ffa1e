"""Weights spread over two processes while an engine writes: none has a whole model, and the steps are those of one."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, make_tokenizer
from test_processes import Run, metrics, run, weights
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory.worker import Meter, watch, weight_bytes
from xpo_lightning import RolloutEngine

__all__ = ["run"]

pytestmark = pytest.mark.slow
RANK = int(os.environ.get("LOCAL_RANK", "0"))
MOST = 12


class Elsewhere(RolloutEngine):
    """Writes what the random numbers say, without a model: of each prompt 1 to 12 tokens, of a third of them one.

    Args:
        folder: Gets the lengths that each process was given.
        fails: The call of `write` in which process 1 fails; 0 is none.
    """

    copies_weights = True

    def __init__(self, folder: str, fails: int = 0) -> None:
        super().__init__()
        self.folder, self.fails, self.calls = Path(folder), fails, 0

    def sync(self, policy: Any) -> None:
        pass

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        self.calls += 1
        written = [[self.some(prompts, numbers) for numbers in each.uniforms] for each in asked]
        with (self.folder / f"lengths{RANK}.jsonl").open("a") as file:
            file.write(json.dumps([[list(some.counts) for some in each] for each in written]) + "\n")
        if RANK == 1 and self.calls == self.fails:
            raise RuntimeError("the engine has no power")
        return written

    def some(self, prompts: Any, numbers: torch.Tensor) -> Any:
        rows = [row[: max(1, int((row[0] * 1.5 - 0.5) * MOST))] for row in numbers.tolist()]
        ids = [[5 + int(number * (VOCABULARY - 10)) for number in row] for row in rows]
        return self.completions(ids, [[-1.0] * len(row) for row in rows], prompts, [len(row) < MOST for row in rows])


class Peak(Meter):
    """Writes down the peak of the tensors of each process in the second batch.

    Args:
        folder: Gets a file of each process.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(watches=True)
        self.folder = Path(folder)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx < 2:  # the first too, since torch reports no release of what it was not seen to allocate
            states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            gradients = [weight.grad for weight in pl_module.trained_parameters() if weight.grad is not None]
            self.loaded = weight_bytes(pl_module) + sum(local(tensor).nbytes for tensor in (*states, *gradients))
            self.profiler = watch()
            self.profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx < 2:
            self.profiler.stop()
            (self.folder / f"peak{RANK}.json").write_text(json.dumps(self.peak()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pass


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that may be spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a Llama of 32 layers, as models of 8B have: few layers are little of it, and other weights hardly any."""
    folder = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def options_of(kind: str, model: str) -> dict[str, Any]:
    reward = {"class_path": "SequenceClassifierReward", "init_args": {"path": model, "allow_untrained_head": True}}
    return {
        "policy": {"path": model, "gradient_checkpointing": True},  # activations are little then
        "reward": reward,
        "sampling": {"max_new_tokens": MOST, "eos_token_ids": [2]},
        "rollout_batch_size": 1,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        "rows": 22,
        "validation_size": 2,
        **({"lora": {"r": 2}} if kind == "LoRA" else {}),
    }


@pytest.fixture
def engine_run(run: Run, tmp_path: Path, deep_model: str) -> Callable[..., Path]:
    """Give a function that makes a run whose completions `Elsewhere` writes, and returns its folder."""

    def make(kind: str, processes: int, *, fails: int = 0, **changes: Any) -> Path:
        folder = tmp_path / changes.setdefault("name", str(processes))
        rollout = {"class_path": f"{__name__}.Elsewhere", "init_args": {"folder": str(folder), "fails": fails}}
        callbacks = [{"class_path": f"{__name__}.Peak", "init_args": {"folder": str(folder)}}]
        options = {**options_of(kind, deep_model), "rollout": rollout, "callbacks": callbacks, **changes}
        run(tmp_path, processes, **copy.deepcopy(options))
        return folder

    return make


def passes_of(folder: Path, rank: int) -> list[int]:
    """Count the completions of more than one token, which take a pass of their own, in each call of the engine."""
    calls = [json.loads(line) for line in (folder / f"lengths{rank}.jsonl").read_text().splitlines()]
    return [sum(length > 1 for each in call for some in each for length in some) for call in calls]


def peak_of(folder: Path) -> int:
    return max(json.loads(file.read_text()) for file in folder.glob("peak*.json"))


@pytest.mark.parametrize("kind", ["all weights", "LoRA"])
def test_two_processes_score_in_parts_and_take_the_steps_of_one(engine_run: Callable[..., Path], kind: str):
    """Losses, weights, the peak of tensors, and an exact resume from the second batch on."""
    options = {"reduce_each_micro_batch": True, "offload_reference": kind == "all weights"}
    strategy = {"class_path": "FSDP2Strategy", "init_args": options}
    one, two = engine_run(kind, 1), engine_run(kind, 2, strategy=strategy)
    assert passes_of(two, 0) != passes_of(two, 1), "another number of passes on each process"
    assert len(metrics(one)) == len(metrics(two)) == 6, "five steps and a validation"
    for single, double in zip(metrics(one), metrics(two), strict=True):
        for name, value in single.items():
            if "loss/" in name or "scores" in name or "length" in name or name == "grad_norm":
                assert double[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    whole, first = weights(two), weights(one)
    assert whole.keys() == first.keys()
    for name, value in first.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)
    assert peak_of(two) <= 0.6 * peak_of(one), (peak_of(two), peak_of(one))
    checkpoints = sorted((two / "version_0" / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    for file in checkpoints[1:]:
        file.unlink()
    engine_run(kind, 2, strategy=strategy, resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in weights(two).items())


def test_prompts_that_do_not_divide_evenly_are_predicted(run: Run, tmp_path: Path):
    """Process 1 has a batch less, and takes part in the passes of the other until that has finished."""
    rollout = {"class_path": f"{__name__}.Elsewhere", "init_args": {"folder": str(tmp_path)}}
    options = {"strategy": {"class_path": "FSDP2Strategy"}, "rollout": rollout, "validation_size": 5}
    run(tmp_path, 2, command="predict", sampling={"max_new_tokens": MOST}, **options)
    files = sorted((tmp_path / "2" / "predict").glob("predictions*"))
    assert [len(file.read_text().splitlines()) for file in files] == [3, 2]


def test_an_engine_that_fails_in_one_process_ends_the_run_in_both(run: Run, tmp_path: Path):
    rollout = {"class_path": f"{__name__}.Elsewhere", "init_args": {"folder": str(tmp_path), "fails": 2}}
    options = {"strategy": {"class_path": "FSDP2Strategy"}, "rollout": rollout, "sampling": {"max_new_tokens": MOST}}
    with pytest.raises(AssertionError, match="the engine has no power"):
        run(tmp_path, 2, **options)
    assert len(metrics(tmp_path / "2")) == 1
