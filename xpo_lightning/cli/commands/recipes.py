"""`xpo recipes`: lists and copies the configs that come with the package."""

import shutil
from pathlib import Path

from xpo_lightning.core import recipes as shipped
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.printable import aligned


def recipes(name: str | None = None, target: str | None = None, /) -> None:
    """List the configs that come with the package, or copy one to change it.

    Args:
        name: The recipe to copy; without one, all recipes are listed.
        target: The file to write; by default the recipe's own name in the current folder.
    """
    known = shipped.recipes()
    if name is None:
        print(*aligned((title, shipped.purpose_of(file)) for title, file in known.items()), sep="\n")
        print("\nxpo fit --config NAME runs one; xpo recipes NAME copies its file.")
        return
    recipe = shipped.recipe_named(name)
    if recipe is None:
        shipped.config_file(name, "xpo recipes")
        raise InputError(f"xpo recipes: '{name}' is a file, not a recipe (there are {', '.join(known)})")
    path = Path(target or known[recipe].name)
    if path.exists():
        raise InputError(f"xpo recipes: '{path}' exists; name another file")
    shutil.copyfile(known[recipe], path)
    print(f"{path}")
