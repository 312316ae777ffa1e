"""Distributed checkpoints: folders in which each process has saved its own part of the tensors."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from xpo_lightning.errors import InputError
from xpo_lightning.run_folder.checkpoint_io import read_checkpoint

METADATA, OTHERS = ".metadata", "meta.pt"
_STORAGE = "torch.distributed.checkpoint"
_PLAIN = {
    (f"{_STORAGE}.metadata", name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    )
} | {
    *((f"{_STORAGE}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")),
    *(("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("collections", "OrderedDict")),
}


def read_folder(path: Path) -> dict[str, Any]:
    """Read what a distributed checkpoint holds beside tensors, and see that nothing in it could run code.

    Raises:
        InputError: It is not whole, or not safe.
    """
    if not (path / METADATA).is_file():
        raise InputError(f"'{path}' is no checkpoint, or a distributed one that is not whole: it has no {METADATA}")
    content = read_checkpoint(path / OTHERS)
    try:
        _Plain(io.BytesIO((path / METADATA).read_bytes())).load()
    except _ForeignError as error:
        raise InputError(f"'{path / METADATA}' holds {error}, which could run code, and is not loaded") from error
    except Exception as error:  # The bytes are arbitrary, and so is what a reader makes of them.
        raise InputError(f"'{path / METADATA}' is damaged ({error!s:.160})") from error
    return content


class _ForeignError(Exception):
    """Something else than a description of tensors is named."""


class _Plain(pickle.Unpickler):
    """Reads what torch writes about tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all but the classes that describe tensors and files."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (is_dtype or (module, name) in _PLAIN):
            raise _ForeignError(f"{module}.{name}")
        return super().find_class(module, name)
