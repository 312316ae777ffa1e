"""From a name in a config to something that can be loaded, and one clear error where it cannot.

A name is a local path, a hub id (`owner/name`), or `package:module/path`: a file inside an installed Python package,
which is how the embedded models and models from PyPI are named.
"""

import importlib.resources
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xpo_lightning.errors import InputError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".gguf", ".safetensors"}


def resolve(name: str, key: str) -> str:
    """Turn a name into a local path, or leave it as a hub id.

    Args:
        name: Local path, hub id or `package:module/path`.
        key: The configuration key that holds the name, for the error.

    Returns:
        An existing local path, or the hub id unchanged.

    Raises:
        InputError: The name can only be a path, and nothing is there; or the package is not installed.
    """
    if name.startswith("package:"):
        return _inside_package(name, key)
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if _looks_like_a_path(name):
        raise InputError(f"{key}: there is nothing at '{name}' (looked in {Path.cwd()}); give an existing path or a hub id")
    return name


def is_local(resolved: str) -> bool:
    """Tell whether `resolve` found a local path."""
    return Path(resolved).exists()


@contextmanager
def explaining_hub_errors(name: str, key: str) -> Iterator[None]:
    """Turn the many errors of a failed hub download into one line.

    Args:
        name: The hub id being loaded.
        key: The configuration key that holds it.

    Raises:
        InputError: The hub could not be reached, or has no such repository.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError) or is_local(name):
            raise
        raise InputError(
            f"{key}: could not load '{name}' from the Hugging Face hub, and no local path has that name "
            f"({_first_line(error)}); check the name and the network, or give a local path"
        ) from error


def _inside_package(name: str, key: str) -> str:
    package, _, inner = name.removeprefix("package:").partition("/")
    try:
        path = Path(str(importlib.resources.files(package).joinpath(inner)))
    except ModuleNotFoundError as error:
        raise InputError(f"{key}: '{name}' needs the Python package '{package}', which is not installed") from error
    if not path.exists():
        raise InputError(f"{key}: the Python package '{package}' has no '{inner}'")
    return str(path)


def _looks_like_a_path(name: str) -> bool:
    explicit = name.startswith((".", "~", os.sep)) or Path(name).suffix in _FILE_SUFFIXES
    return explicit or not _HUB_ID.fullmatch(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
