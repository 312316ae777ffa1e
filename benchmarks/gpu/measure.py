"""Measures on a CUDA device: optimizer steps' memory beside the arithmetic, a token's time, a step's beside TRL's.

    python -m benchmarks.gpu.measure --json gpu.json

Run it with an interpreter that has this package, TRL and bitsandbytes. Models have the shapes of public ones and random
weights; nothing is downloaded.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.assets import DEVICE, SHAPES, make_assets
from benchmarks.gpu.decode import decode_cases, measure_decoding
from benchmarks.gpu.memory import MEMORY_CASES, measure_memory
from benchmarks.speed.environments import start
from benchmarks.speed.suites import LORA, SHARED

Run = dict[str, Any]
GIB = 2**30
TRL_FAST = {"gradient_checkpointing": False, "bf16": False, "logging_strategy": "no", "disable_tqdm": True}
PROMPTS, NEW_TOKENS = 128, 64
SHIPPED_PROMPTS, SHIPPED_BATCH = 16, 4
"""TRL as shipped is timed on so many prompts of the step, at the batch of its own example."""


def main() -> None:
    """Measure what is asked for, and print the tables."""
    args = _arguments()
    device = torch.cuda.get_device_name(0) if DEVICE == "cuda" else "a CPU"
    record: Run = {"device": device, "torch": torch.__version__, "memory": [], "decode": [], "time": [], "trace": []}
    print(f"{device}, torch {torch.__version__}", flush=True)
    for case in MEMORY_CASES if args.only in (None, "memory") else ():
        record["memory"].append(measure_memory(case))
        print(memory_row(record["memory"][-1]), flush=True)
        _write(record, args.json)
    for name, rows in decode_cases(args.models) if args.only in (None, "decode") else ():
        for row in measure_decoding(name, rows):
            record["decode"].append(row)
            print(decode_row(row), flush=True)
        _write(record, args.json)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models if args.only in (None, "time", "trace") else ():
            assets = make_assets(Path(folder) / name, name, args.prompts)
            specs = time_specs(name, assets, args)
            for label, worker, spec in specs if args.only != "trace" else ():
                record["time"].append({"run": label, **_measure(worker, spec)})
                print(time_row(record["time"][-1]), flush=True)
                _write(record, args.json)
            if args.only in (None, "trace"):
                record["trace"].append({"run": name, **_measure("gpu.worker_trace", specs[0][2])})
                print(record["trace"][-1].pop("table", ""), record["trace"][-1], sep="\n", flush=True)
                _write(record, args.json)


def _write(record: Run, file: Path | None) -> None:
    """Write what was measured so far: a machine may be taken away before the end."""
    if file is not None:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "decode", "time", "trace"], help="one of the four")
    parser.add_argument(
        "--models", nargs="*", default=["smollm2", "1b"], choices=list(SHAPES), help="shapes to measure"
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of a step")
    parser.add_argument("--trl-batches", type=int, nargs="*", default=[16, 64], help="batch sizes to try of TRL")
    parser.add_argument("--shipped", action="store_true", help="time TRL as shipped, too")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser.parse_args()


def time_specs(name: str, assets: Path, args: argparse.Namespace) -> list[tuple[str, str, Run]]:
    """Describe the timed runs of a model to their workers: ours, TRL at its best, TRL as shipped.

    Args:
        name: The model.
        assets: Its folder.
        args: Prompts of a step, batch sizes to try of TRL at its best, and whether TRL as shipped is timed, too.
    """
    shared = {
        **SHARED,
        "suite": name,
        "assets": str(assets),
        "prompts": str(assets / "prompts.jsonl"),
        "dtype": "bfloat16",
        "accelerator": "gpu" if DEVICE == "cuda" else "cpu",
        "step_prompts": args.prompts,
        "timed_prompts": args.prompts,
        "new_tokens": NEW_TOKENS,
        "lora": None,
    }
    # Kernels are loaded for each new shape, so both sides warm up by a whole step of other prompts; ours by another
    # one before, which measures how many tokens go into a micro-batch.
    ours = {**shared, "system": "ours", "options": {}, "warm_up_prompts": args.prompts, "warm_up_steps": 2}
    best = {**shared, "system": "trl-best", "options": TRL_FAST, "warm_up_prompts": args.prompts}
    few = {"timed_prompts": SHIPPED_PROMPTS, "warm_up_prompts": SHIPPED_PROMPTS, "batch": SHIPPED_BATCH}
    shipped = {**shared, **few, "system": "trl-shipped", "options": {}}
    specs = [(f"{name}, ours", "speed.worker_ours", ours)]
    specs += [
        (f"{name}, TRL, best settings, batch {batch}", "speed.worker_trl", {**best, "batch": batch})
        for batch in args.trl_batches
    ]
    specs += [(f"{name}, ours, LoRA", "speed.worker_ours", {**ours, "lora": LORA})]
    if args.shipped:
        specs.append((f"{name}, TRL as shipped, batch {SHIPPED_BATCH}", "speed.worker_trl", shipped))
    return specs


def _measure(worker: str, spec: Run) -> Run:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        output = start(sys.executable, worker, json.dumps(spec), env={**os.environ, **quiet})
    except SystemExit as error:  # Out of memory, for example: the other runs are worth having.
        return {"failed": str(error)}
    measured: Run = json.loads(output.splitlines()[-1])
    return measured


def memory_row(result: Run) -> str:
    """Write a line of the memory table, in GiB."""
    gib = [result[name] / GIB for name in ("standing", "peak", "measured_standing", "measured_peak", "reserved")]
    ratio = result["peak"] / result["measured_peak"]
    return "| " + " | ".join([result["name"], *(f"{each:.2f}" for each in gib), f"{ratio:.2f}"]) + " |"


def decode_row(result: Run) -> str:
    """Write a line of the decoding table: milliseconds a token, and of reading the prompts."""
    numbers = (f"{1000 * result['token_seconds']:.2f}", f"{1000 * result['read_seconds']:.0f}")
    return "| " + " | ".join([f"{result['model']}, {result['rows']} rows, {result['way']}", *numbers]) + " |"


def time_row(result: Run) -> str:
    """Write a line of the time table: milliseconds a prompt, seconds a step, new tokens a second, GiB."""
    if "failed" in result:
        return f"| {result['run']} | {result['failed']} |"
    phases = ", ".join(f"{name} {1000 * value:.1f}" for name, value in result["phases_per_prompt"].items())
    numbers = (
        f"{1000 * result['seconds_per_prompt']:.1f}",
        f"{result['step_seconds']:.2f}",
        f"{result['tokens_per_second']:.0f}",
        f"{result['gpu_peak_gib']:.2f}",
    )
    return "| " + " | ".join([result["run"], *numbers, phases]) + " |"


if __name__ == "__main__":
    main()
