"""Reads the text of a config as nodes that know their line, and refuses what YAML reads without a word."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from xpo_lightning.core.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a user wrote an option.

    Args:
        source: The name of a config file, or `the command line`.
        line: The line in the file.
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        """Return it as part of a sentence."""
        return f"on {self.source}" if self.line is None else f"in {self.source}, line {self.line}"


COMMAND_LINE = Place("the command line")


def read_config(text: str, source: str) -> yaml.MappingNode:
    """Read the text of a config.

    Args:
        text: YAML.
        source: The name of the file, for errors.

    Raises:
        InputError: It is no YAML, no mapping, or holds a key twice.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1 if mark else None)
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        if "'\\t'" in problem:
            raise InputError(f"{_begin(place)}: there is a tab; YAML is indented by spaces alone") from error
        raise InputError(f"{_begin(place)}: this is no YAML ({problem})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: this is no YAML ({' '.join(str(error).split()):.200})") from error
    if node is None:
        raise InputError(f"{source} is empty; give it options, or leave it out")
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{source}, line 1: a config holds options, `key: value`, and here is something else")
    _refuse_duplicates(node, source)
    return node


def entries(node: yaml.MappingNode, source: str) -> Iterator[tuple[str, Place, yaml.Node]]:
    """Yield each key of a mapping, its place, and its value."""
    for key, value in node.value:
        on_command_line = source == COMMAND_LINE.source
        yield str(key.value), COMMAND_LINE if on_command_line else Place(source, key.start_mark.line + 1), value


def _refuse_duplicates(root: yaml.Node, source: str) -> None:
    """Refuse a key that stands twice in a mapping: YAML would take the last, and drop what the first holds."""
    left, seen = [("", root)], set[int]()
    while left:
        path, node = left.pop()
        if id(node) in seen:  # An alias, perhaps of what it stands in.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += [(path, element) for element in node.value]
        if not isinstance(node, yaml.MappingNode):
            continue
        first: dict[str, int | None] = {}
        for key, place, value in entries(node, source):
            name = f"{path}.{key}".removeprefix(".")
            if key in first and key != "<<":
                raise InputError(
                    f"{source}: '{name}' stands in line {first[key]} and again in line {place.line}, which would "
                    f"replace all that the first holds; put them together"
                )
            first[key] = place.line
            left.append((name, value))


def _begin(place: Place) -> str:
    return str(place).removeprefix("in ").removeprefix("on ")
