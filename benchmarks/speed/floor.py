"""The least time that a step's matrix products take on this machine, at the rate that this machine reaches.

    python -m benchmarks.speed.floor pythia FOLDER

FOLDER has the suite's models and prompts, as `compare.py` makes them. Run it with an interpreter that has PyTorch and
transformers. The last line is JSON. `flops.py` has the arithmetic: floor = FLOP a prompt / FLOP a second.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed.flops import Shape, step_flop
from benchmarks.speed.suites import LORA, SHARED, SUITES

# Rows of a product: a prefill, a training micro-batch's completions, a decoding batch.
BODY_ROWS, HEAD_ROWS = 2048, 512


def main() -> None:
    """Count, measure, divide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    suite = SUITES[args.suite]
    keep_freed_memory()
    shape = shape_of(args.folder / "policy", LORA["r"] if suite.lora else None)
    lengths = prompt_lengths(args.folder / "prompts.jsonl", suite.prompts)
    parts = [step_flop(shape, prompt, SHARED["new_tokens"]) for prompt in lengths]
    gflop = {name: sum(part[name] for part in parts) / len(parts) / 1e9 for name in parts[0]}
    rates = product_rates(shape, getattr(torch, suite.dtype))
    rate = median(rates.values())
    print(
        json.dumps(
            {
                "gflop_per_prompt": gflop,
                "gflops_per_second": rate,
                "rates": rates,
                "seconds_per_prompt": sum(gflop.values()) / rate,
                "seconds_per_prompt_at_best_rate": sum(gflop.values()) / max(rates.values()),
                "mean_prompt_tokens": sum(lengths) / len(lengths),
            }
        )
    )


def keep_freed_memory() -> None:
    """Tell glibc to reuse memory instead of asking the system for fresh pages each time, which would be measured."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def shape_of(folder: Path, lora_rank: int | None) -> Shape:
    """Read a model's shape from its configuration, without weights.

    Args:
        folder: The model.
        lora_rank: Rank of adapters on every linear layer of the blocks; None where all weights are trained.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    heads = config.num_attention_heads
    return Shape(
        body=sum(linear.weight.numel() for linear in linears),
        layers=config.num_hidden_layers,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        adapters=sum(linear.in_features + linear.out_features for linear in linears) * (lora_rank or 0),
    )


def prompt_lengths(file: Path, count: int) -> list[int]:
    """Return the lengths of a step's prompts, in tokens."""
    lines = file.read_text(encoding="utf-8").splitlines()[:count]
    return [len(json.loads(line)["prompt_ids"]) for line in lines]


def product_rates(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Measure products of the model's own sizes.

    Returns:
        GFLOP a second of each size, by the faster of PyTorch's two kernels.
    """
    wide = 4 * shape.hidden
    sizes = [
        (BODY_ROWS, shape.hidden, shape.hidden),
        (BODY_ROWS, shape.hidden, wide),
        (BODY_ROWS, wide, shape.hidden),
        (HEAD_ROWS, shape.hidden, shape.vocabulary),
    ]
    return {f"({n}, {a}) x ({a}, {b})": product_rate(n, a, b, dtype) for n, a, b in sizes}


def product_rate(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """Measure one product, and return GFLOP a second."""
    inputs, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
    kernels: list[Callable[[Tensor, Tensor], Tensor]] = [nn.functional.linear]
    if torch.backends.mkldnn.is_available():
        kernels.append(_onednn_linear)
    seconds = min(_seconds(lambda kernel=kernel: kernel(inputs, weight)) for kernel in kernels)
    return 2 * rows * inner * outer / seconds / 1e9


def _onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return product


@torch.no_grad()
def _seconds(product: Callable[[], Tensor], measured_for: float = 0.5) -> float:
    """Return the median seconds of a product, over about half a second and 5 times at least."""
    product()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < measured_for:
        begun = time.perf_counter()
        product()
        taken.append(time.perf_counter() - begun)
    return median(taken)


if __name__ == "__main__":
    main()
