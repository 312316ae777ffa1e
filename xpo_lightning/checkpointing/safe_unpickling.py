"""Reads files of torch.distributed.checkpoint without running code that they may hold."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from xpo_lightning.core.errors import InputError

METADATA = ".metadata"
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


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a folder: its tensors, and the files that hold them.

    Raises:
        InputError: It is damaged, could run code, or names a file outside of the folder.
    """
    try:
        metadata = _Plain(io.BytesIO((path / METADATA).read_bytes())).load()
        places = {info.relative_path for info in metadata.storage_data.values()}
    except _ForeignError as error:
        raise InputError(f"'{path / METADATA}' holds {error}, which could run code, and is not loaded") from error
    except Exception as error:  # The bytes are arbitrary, and so is what a reader makes of them.
        raise InputError(f"'{path / METADATA}' is damaged ({error!s:.160})") from error
    for place in places:
        if not isinstance(place, str) or Path(place).name != place or not (path / place).is_file():
            raise InputError(f"'{path / METADATA}' is damaged (there is no file {place!r:.100})")
    if not isinstance(metadata, Metadata):
        raise InputError(f"'{path / METADATA}' is damaged (it holds a {type(metadata).__name__})")
    return metadata


class PlainReader(FileSystemReader):
    """Reads a folder as torch does, except for its metadata, which is unpickled safely."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Read the metadata without running code; see `StorageReader.read_metadata`."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """Loads as torch does, but unpickles nothing that could run code."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Load the plain values safely, and give torch a new pickle of them; see `LoadPlanner.load_bytes`."""
        copy = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


class _ForeignError(Exception):
    """A file names something that is not part of a description of tensors."""


class _Plain(pickle.Unpickler):
    """Unpickles torch's descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all but the classes that describe tensors and files."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (is_dtype or (module, name) in _PLAIN):
            raise _ForeignError(f"{module}.{name}")
        return super().find_class(module, name)
