"""The configs that come with the package, by name: `--config quickstart`."""

from collections.abc import Iterator
from pathlib import Path

from xpo_lightning.core.errors import InputError, did_you_mean
from xpo_lightning.core.paths import SHIPPED_CONFIGS, existing_path


def recipes() -> dict[str, Path]:
    """Return the file of each recipe by its name; that of an overlay for a method begins with `methods/`."""
    files = sorted(SHIPPED_CONFIGS.rglob("*.yaml"))
    return {f"methods/{file.stem}" if file.parent.name == "methods" else file.stem: file for file in files}


def purpose_of(file: Path) -> str:
    """Return the first line of a recipe, which holds its first sentence."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").strip()


def recipe_named(name: str) -> str | None:
    """Return the recipe that a name means: `tldr`, `tldr.yaml`, or its path among the configs; None if there is none.

    Args:
        name: A word of the command line.
    """
    path = Path(name)
    bare = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    for recipe, file in recipes().items():
        inner = file.relative_to(SHIPPED_CONFIGS).with_suffix("")
        if bare in (Path(recipe), inner, SHIPPED_CONFIGS.name / inner):
            return recipe
    return None


def config_file(name: str, key: str = "--config") -> str:
    """Resolve a name to a config file.

    Args:
        name: A file or the name of a recipe, with or without `.yaml`; an existing file of that name comes first.
        key: The option that holds it, for the error.

    Returns:
        A path.

    Raises:
        InputError: No file and no recipe has that name.
    """
    known = recipes()
    found = existing_path(name)
    if found is not None and not found.is_dir():
        return name
    recipe = recipe_named(name)
    if recipe is not None:
        return str(known[recipe])
    path = Path(name).with_suffix("")
    hint = did_you_mean(path.name, known) or did_you_mean(path.as_posix(), known) or "; `xpo recipes` lists them"
    raise InputError(f"{key}: there is no file '{name}', and no recipe of that name{hint}")


def with_config_files(words: list[str]) -> tuple[list[str], list[str]]:
    """Replace recipe names on a command line by their files; leave inline configs alone.

    Args:
        words: A command line.

    Returns:
        The changed command line, and the config files that it names.

    Raises:
        InputError: A name belongs to no file and no recipe.
    """
    changed, files = list(words), []
    for place, before, name in _named(words):
        files.append(config_file(name))
        changed[place] = before + files[-1]
    return changed, files


def _named(words: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield, for each word that names a config, its index, the text before the name in that word, and the name."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        follows = not equals and place + 1 < len(words)
        name = words[place + 1] if follows else value
        if option in ("--config", "-c") and name and "\n" not in name and not name.lstrip().startswith("{"):
            yield place + follows, option + equals if equals else "", name
