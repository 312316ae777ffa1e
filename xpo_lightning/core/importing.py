"""Imports the functions that a config names, from its own folder too: `myreward.positive`, `mine.py:positive`."""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from xpo_lightning.core.errors import InputError, describe_error, did_you_mean
from xpo_lightning.core.paths import SHIPPED_CONFIGS, existing_path

KEY = "import_from"
"""Key of a config that lists further folders to import from; a saved config lists those of its run."""
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[\w.]*)")
_searched: list[str] = []
_added: list[str] = []  # Those of them that are in `sys.path` by this module alone.
_files_in: set[str] = set()  # Those of the folders above that a relative file was found in.


def search_beside(configs: Sequence[str]) -> None:
    """Let modules be imported from the current folder, the folders of config files, and those that the files list.

    They come after all other places, so that no file of the user hides an installed package. Folders that an earlier
    call added are left out again.

    Args:
        configs: The config files.
    """
    folders = [Path.cwd(), *(Path(file).parent for file in configs)]
    folders += [Path(folder) for file in configs for folder in _listed_in(Path(file))]
    for folder in _added:
        if folder in sys.path:
            sys.path.remove(folder)
    _searched[:] = dict.fromkeys(
        str(folder.absolute()) for folder in folders if not folder.absolute().is_relative_to(SHIPPED_CONFIGS)
    )
    _added[:] = [folder for folder in _searched if folder not in sys.path]
    sys.path += _added
    importlib.invalidate_caches()


def folders_in_use() -> list[str]:
    """Return the folders, of those that `search_beside` added, that a module was imported from."""
    files = [getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "." not in name]
    paths = [Path(file) for file in files if file]
    used = {str(path.parent.parent if path.name == "__init__.py" else path.parent) for path in paths}
    return [folder for folder in _searched if folder in used | _files_in]


def _listed_in(config: Path) -> list[str]:
    """Read the key of a config file; what is wrong with the file is said where it is parsed."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    listed = content.get(KEY) if isinstance(content, dict) else None
    return [folder for folder in listed if isinstance(folder, str)] if isinstance(listed, list) else []


def import_function(name: str, key: str) -> Callable[..., Any]:
    """Import a function, or make an object of a class that can be called.

    Args:
        name: An import path, `package.module.function`, or a file and a function, `path/to/file.py:function`. A
            relative file is looked for in the current folder and in the folders that `search_beside` added.
        key: The option that holds the name, for errors.

    Raises:
        InputError: There is no such module, file or function, or importing it failed.
    """
    in_file = _FILE.fullmatch(name)
    if in_file is not None:
        module, attributes = _import_file(in_file["file"], key), in_file["name"]
    else:
        module, attributes = _import_module(name, key)
    found: Any = module
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            names = [one for one in vars(found) if not one.startswith("_")]
            place = getattr(module, "__file__", None) or "no file"
            raise InputError(
                f"{key}: '{module.__name__}' ({place}) has no '{attribute}'{did_you_mean(attribute, names)}"
            )
        found = getattr(found, attribute)
    found = found() if inspect.isclass(found) else found
    if not callable(found):
        raise InputError(f"{key}: '{name}' is no function, but of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _import_module(name: str, key: str) -> tuple[ModuleType, str]:
    """Import the longest beginning of a dotted name that is a module; return it and the rest of the name."""
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InputError(
            f"{key}: '{name}' is neither an import path, as myreward.positive, nor a file and a function, as "
            f"path/to/myreward.py:positive"
        )
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            return importlib.import_module(module), ".".join(parts[count:])
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise _failed(module, key, error) from error  # One that it imports itself.
        except Exception as error:  # The code of users may raise anything.
            raise _failed(module, key, error) from error
    folders = ", ".join(f"'{folder}'" for folder in _searched) or f"'{Path.cwd()}'"
    raise InputError(
        f"{key}: there is no module '{parts[0]}' for '{name}', neither installed nor in {folders}; put {parts[0]}.py "
        f"into one of these folders, or give the file, path/to/{parts[0]}.py:{parts[-1]}"
    )


def _import_file(name: str, key: str) -> ModuleType:
    folders = list(dict.fromkeys([str(Path.cwd()), *_searched]))
    places = {folder: existing_path(str(Path(folder, Path(name).expanduser()))) for folder in folders}
    folder, found = next(((folder, path) for folder, path in places.items() if path is not None), ("", None))
    if found is None:
        raise InputError(f"{key}: there is no file '{name}' in {', '.join(map(repr, folders))}")
    _files_in.add(folder)
    path = found.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    taken = path.stem in sys.modules or importlib.util.find_spec(path.stem) is not None
    title = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{key}: '{path}' is no Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # For what it imports from beside it.
    module = sys.modules[title] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # The code of users may raise anything.
        del sys.modules[title]
        raise _failed(str(path), key, error) from error
    return module


def _failed(what: str, key: str, error: Exception) -> InputError:
    return InputError(f"{key}: importing '{what}' {describe_error(error)}")
