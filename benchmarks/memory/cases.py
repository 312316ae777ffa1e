"""Runs whose memory is measured, and what the arithmetic of `estimate.py` says of each."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.scale.shapes import RunInputs, estimate, estimate_sharded
from xpo_lightning.reporting.memory.fsdp import Sharding
from xpo_lightning.reporting.memory.model_shape import Shape

SHAPES = {
    "pythia": Shape(
        layers=6, hidden=128, heads=4, kv_heads=4, head_dim=32, intermediate=512, vocabulary=50304, gated=False
    ),
    "smollm2": Shape(
        layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=49152, tied=True
    ),
    "llama-300m": Shape(
        layers=20, hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=2816, vocabulary=49152, tied=True
    ),
}
READ_TOKENS = 2**11  # what is read in one call on a CPU
LORA = {"r": 16, "alpha": 32}


@dataclass(frozen=True)
class Case:
    """A run of two optimizer steps on a CPU.

    Args:
        name: What it is called on the command line.
        model: Which model is policy, reference and reward model; see `assets.py`.
        dtype: Type of the weights.
        lora: Whether adapters are trained in place of all weights.
        checkpointing: `model.policy.gradient_checkpointing`.
        reward_model: Whether a reward model of the policy's shape scores; a rule does otherwise.
        processes: Processes under `FSDP2Strategy`; 1 is no strategy.
        prompts: Prompts of a batch, of each process.
        prompt_tokens: Tokens of every prompt.
        new_tokens: Tokens of every completion.
        micro_batch_size: Pairs of a micro-batch.
    """

    name: str
    model: Literal["pythia", "smollm2", "llama-300m"]
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: bool = False
    checkpointing: bool = False
    reward_model: bool = True
    processes: int = 1
    prompts: int = 4
    prompt_tokens: int = 256
    new_tokens: int = 12
    micro_batch_size: int = 2

    def spec(self, assets: Path) -> dict[str, Any]:
        """Describe the run to `worker.py`.

        Args:
            assets: Folder with `policy` and `reward`.
        """
        return {
            "assets": str(assets),
            "dtype": self.dtype,
            "lora": LORA if self.lora else None,
            "checkpointing": self.checkpointing,
            "reward_model": self.reward_model,
            "processes": self.processes,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "micro_batch_size": self.micro_batch_size,
        }


SMOLLM2 = Case("smollm2", "smollm2")
CASES = {
    case.name: case
    for case in (
        Case("pythia", "pythia", prompts=32, new_tokens=32, micro_batch_size=8),
        SMOLLM2,
        replace(SMOLLM2, name="smollm2-checkpointing", checkpointing=True),
        replace(SMOLLM2, name="smollm2-lora", dtype="bfloat16", lora=True),
        replace(SMOLLM2, name="smollm2-lora-checkpointing", dtype="bfloat16", lora=True, checkpointing=True),
        replace(SMOLLM2, name="smollm2-fsdp2", processes=2),
        replace(SMOLLM2, name="smollm2-fsdp2-one-micro-batch", processes=2, prompts=2),
        replace(SMOLLM2, name="smollm2-lora-fsdp2", lora=True, processes=2),
        Case("llama-300m", "llama-300m", reward_model=False),
    )
}


def plan_of(case: Case, shape: Shape) -> RunInputs:
    """Describe a case, whose model has this shape, to `estimate`."""
    width = 2 if case.dtype == "bfloat16" else 4
    return RunInputs(
        policy=shape,
        reward=replace(shape, tied=True) if case.reward_model else None,  # no vocabulary head
        weight_bytes=width,
        reward_bytes=width,
        compute_bytes=width,
        lora_rank=LORA["r"] if case.lora else None,
        gradient_checkpointing=case.checkpointing,
        rows=case.prompts,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        micro_batch_size=case.micro_batch_size,
        reward_rows=min(16, 2 * case.prompts),
        read_tokens=READ_TOKENS,
    )


def predicted(case: Case, shape: Shape | None = None) -> dict[str, int]:
    """Work out the peak of a case, of its own model or of one of another shape, and what is there all the time."""
    plan = plan_of(case, shape or SHAPES[case.model])
    if case.processes == 1:
        foot = estimate(plan)
        return {"standing": foot.standing, "peak": foot.peak}
    sharded = estimate_sharded(plan, Sharding(case.processes, -(-case.prompts // case.micro_batch_size)))
    return {"standing": sharded.standing, "peak": sharded.peak}
