"""Saves a sharded model as a folder that transformers and vLLM load, without a whole copy of it anywhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from xpo_lightning.models.sharding import visit_full_tensors

INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"^.*?\.\d+\.")


def save_parts(model: Any, folder: Path | None) -> None:
    """Gather a sharded model layer by layer, and save each layer in a file of its own (collective).

    Args:
        model: A sharded transformers model without adapters.
        folder: An empty folder; None on ranks that only take part.
    """
    writer = None if folder is None else _PartWriter(model, folder)
    visit_full_tensors(_saved(model), None if writer is None else writer.add)
    if writer is not None:
        writer.finish()


class _PartWriter:
    """Saves the tensors of a layer once those of another begin."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._layer, self._tensors = "", dict[str, Tensor]()
        self._files: list[Path] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a whole tensor of the model."""
        match = _LAYER.match(name)
        layer = match[0] if match else ""
        if layer != self._layer:
            self._save()
        self._layer = layer
        self._tensors[name] = tensor.cpu()

    def finish(self) -> None:
        """Save what is left, and the index that says which file has which tensor."""
        self._save()
        where = {}
        for file in self._files:
            with safe_open(file, "pt") as content:
                where.update(dict.fromkeys(content.keys(), file.name))
        size = sum(file.stat().st_size for file in self._files)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def _save(self) -> None:
        if not self._tensors:
            return
        # transformers gives the tensors the names that they have in files, and writes the config beside them.
        self.model.save_pretrained(self.folder, state_dict=self._tensors)
        self._tensors = {}
        file = self.folder / f"part-{len(self._files):05d}.safetensors"
        (self.folder / "model.safetensors").rename(file)
        self._files.append(file)


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and buffers that a checkpoint has, tied ones once."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    yield from ((name, value) for name, value in model.state_dict().items() if name not in tied)
