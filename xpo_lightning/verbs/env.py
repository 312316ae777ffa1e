"""`xpo env`: the versions and the hardware that a report of a defect needs."""

import os
import platform
import sys

import torch

from xpo_lightning.versions import installed_version

PACKAGES = (
    *("xpo-lightning", "torch", "lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "peft"),
    *("tokenizers", "safetensors", "huggingface_hub", "bitsandbytes", "gguf", "tensorboard"),
)


def env() -> None:
    """Print the versions and the hardware that a report of a defect needs; nothing about you or your files."""
    lines = {
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        **_accelerators(),
        **{package: installed_version(package) for package in PACKAGES},
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")


def _accelerators() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "none that torch can use"}
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    sizes = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
    return {"gpu": "; ".join(sizes), "cuda": str(torch.version.cuda)}
