"""Adapters on disk, where a server on this machine, or one that shares the folder, loads them from."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from xpo_lightning.errors import InputError

_KEY = "model.rollout.init_args.adapter_folder"


class AdapterFolder:
    """Keeps the adapters that an engine has, each in a folder of its name, in PEFT's format.

    Args:
        path: The folder; it is made if it is not there.

    Raises:
        InputError: There is something else of this name.
    """

    def __init__(self, path: str) -> None:
        if not path.strip():
            raise InputError(f"{_KEY} is empty; give a folder that the server can read")
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{_KEY} must be a folder, but {self.path} is a file")

    def save(self, policy: Any, name: str) -> Path:
        """Write an adapter beside its place, and put it there when it is complete.

        Args:
            policy: A PEFT model.
            name: What the adapter is called, new each time.

        Returns:
            The folder of the adapter.

        Raises:
            InputError: It cannot be written.
        """
        place, beside = self.path / name, self.path / f".{name}.new"
        try:
            beside.mkdir(parents=True)
            # The embeddings are the base model's own; left to itself, peft asks the hub whether they are.
            policy.save_pretrained(str(beside), save_embedding_layers=False)
            beside.rename(place)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise InputError(f"{_KEY}: the adapter cannot be written to {place} ({error})") from error
        return place

    def scramble(self, name: str) -> None:
        """Give an adapter random weights: a fresh one changes nothing, so that nobody could tell where it is used."""
        file = self.path / name / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(0)
        weights = load_file(file)
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=noise))
        save_file(weights, file, {"format": "pt"})

    def remove(self, name: str) -> None:
        """Remove an adapter that the engine has no more use for."""
        shutil.rmtree(self.path / name, ignore_errors=True)


def mark_of(policy: nn.Module) -> str:
    """Hash the adapters' weights, all of them: two states of a policy have two marks."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(policy.named_parameters(), key=lambda named: named[0]):
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
