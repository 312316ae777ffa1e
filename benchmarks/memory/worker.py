"""Measures the memory of two optimizer steps of this package, in a real `Trainer.fit`.

Started by `measure.py` with a JSON spec; each process writes what it has measured into the folder `results`.
"""

import json
import logging
import warnings
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.speed.measuring import memory_gib, read_spec
from xpo_lightning import LoRASpec, ModelSpec, PythonReward, Sampling, SequenceClassifierReward, XPOLightningModule
from xpo_lightning.models.forward.cpu import keep_memory
from xpo_lightning.strategies import FSDP2Strategy

TEXT = "One cold morning, before the first train, Mara found a wet kitten behind the old mill and took it home. "
STEPS = 2  # in the second, gradients and the optimizer's state are there from the beginning


def main() -> None:
    """Take the steps, and write down the peak of the process or, with `tensors`, that of torch's own memory."""
    spec = read_spec()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    keep_memory()
    torch.manual_seed(0)
    before = memory_gib("VmRSS")
    meter = Meter(watches=spec["tensors"])
    trainer = fit(make_module(spec), spec, meter)
    measured = {"tensors": meter.peak()} if spec["tensors"] else {"process": (memory_gib() - before) * 2**30}
    (Path(spec["results"]) / f"{trainer.global_rank}.json").write_text(json.dumps(measured), encoding="utf-8")


def make_module(spec: dict[str, Any]) -> XPOLightningModule:
    """Build the module that a spec describes; nothing is loaded yet."""
    assets = Path(spec["assets"])
    model = SequenceClassifierReward(str(assets / "reward"), dtype=spec["dtype"])
    return XPOLightningModule(
        policy=ModelSpec(str(assets / "policy"), dtype=spec["dtype"], gradient_checkpointing=spec["checkpointing"]),
        reward=model if spec["reward_model"] else PythonReward(by_length),
        lora=None if spec["lora"] is None else LoRASpec(**spec["lora"]),
        sampling=Sampling(max_new_tokens=spec["new_tokens"], eos_token_ids=[]),
        micro_batch_size=spec["micro_batch_size"],
    )


def by_length(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score without a model."""
    return [float(len(completion)) for completion in completions]


class Meter(Callback):
    """Forgets the peak of loading and, where it watches, sees what torch allocates and gives back from then on.

    Args:
        watches: Whether to watch. That takes memory of its own, which the peak of the process would include.
    """

    def __init__(self, watches: bool) -> None:
        self.watches, self.loaded = watches, 0
        self.profiler = watch()

    def on_train_start(self, trainer: Trainer, pl_module: XPOLightningModule) -> None:
        """Set the peak to what is there now."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.loaded = weight_bytes(pl_module)
        if self.watches:
            self.profiler.start()

    def on_train_end(self, trainer: Trainer, pl_module: XPOLightningModule) -> None:
        """Stop watching."""
        if self.watches:
            self.profiler.stop()

    def peak(self) -> int:
        """Return the most bytes of tensors at a time: the weights, and every allocation and release since.

        What another thread gives back, as those of gloo do when they are the last to let go of a tensor, torch does
        not report. It is taken as given back where its address is given out anew.
        """
        nodes = list(self.profiler.profiler.kineto_results.experimental_event_tree())
        events = []
        while nodes:
            node = nodes.pop()
            nodes += node.children
            if node.tag == _EventType.Allocation:
                events.append((node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size))
        return self.loaded + most_bytes((address, size) for _, address, size in sorted(events))


def watch() -> profile:
    """Return what sees torch allocate memory and give it back."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)


def most_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Return the most bytes at a time of allocations and, of negative size, releases: address and size of each."""
    now = most = 0
    starts: list[int] = []
    sizes: dict[int, int] = {}
    for address, size in events:
        at = bisect_left(starts, address)
        if size > 0:
            first = at - 1 if at and starts[at - 1] + sizes[starts[at - 1]] > address else at
            last = bisect_left(starts, address + size)
            now += size - sum(sizes.pop(start) for start in starts[first:last])
            starts[first:last] = [address]
            sizes[address] = size
        else:
            now += size
            if sizes.pop(address, None) is not None:
                del starts[at]
        most = max(most, now)
    return most


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of all weights and buffers here, those that are shared once, and of spread ones this part."""
    tensors = [*module.parameters(), *module.buffers()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def fit(module: XPOLightningModule, spec: dict[str, Any], meter: Callback) -> Trainer:
    """Take two steps on prompts that are all of the same length."""
    ids = module.tokenizer(TEXT * (spec["prompt_tokens"] // 16 + 1))["input_ids"][: spec["prompt_tokens"]]
    text = module.tokenizer.decode(ids)
    batch = {"prompt": [text] * spec["prompts"], "prompt_ids": [ids] * spec["prompts"]}
    trainer = Trainer(
        accelerator="cpu",
        devices=spec["processes"],
        strategy=FSDP2Strategy() if spec["processes"] > 1 else "auto",
        precision=spec.get("precision", "32-true"),
        max_steps=STEPS,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [batch] * STEPS * spec["processes"]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    return trainer


if __name__ == "__main__":
    main()
