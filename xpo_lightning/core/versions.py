"""Versions and hardware for run records and bug reports; nothing about a person or their files."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    *("xpo-lightning", "torch", "lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "peft"),
    *("tokenizers", "safetensors", "huggingface_hub", "bitsandbytes", "gguf", "tensorboard"),
)


def surroundings() -> dict[str, str]:
    """Describe the interpreter, the system and the hardware."""
    return {
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        **_accelerators(),
    }


def versions() -> dict[str, str]:
    """Return the version of each package that matters to a run."""
    return {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str:
    """Return the version of a package, or `not installed`, as for code that runs from its source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _accelerators() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "none that torch can use"}
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    sizes = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
    return {"gpu": "; ".join(sizes), "cuda": str(torch.version.cuda)}
