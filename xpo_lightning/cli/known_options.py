"""The options of a run with the kinds of value that they take, as a table that is read without importing torch."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from jsonargparse._parameter_resolvers import get_signature_parameters

from xpo_lightning import __version__
from xpo_lightning.core.option_kinds import kinds_of

FILE = Path(__file__).with_name("known_options.json")
"""The table of the installed versions, written by `python docs/tools/reference.py`."""
_OURS = "xpo_lightning."
_OPTIONS_READ: dict[type[Any], dict[str, list[str]]] = {}
"""Of each class that was read: reading takes some milliseconds, and a process may parse many command lines."""


@dataclass
class ClassOptions:
    """What a class that an option can name takes.

    Args:
        options: Its options and their kinds; null if it takes any.
        is_abstract: Whether a class derived from it has to be named.
        names: The classes that can be named in its place; a class in another module has its import path.
    """

    options: dict[str, list[str]] | None = None
    is_abstract: bool = False
    names: list[str] = field(default_factory=list)


@dataclass
class KnownOptions:
    """The options of one verb.

    Args:
        options: The kinds of value of each key.
        required: Keys that have no default.
        classes: What the classes in these kinds take; one that is missing takes anything.
    """

    options: dict[str, list[str]]
    required: list[str]
    classes: dict[str, ClassOptions]

    @property
    def groups(self) -> set[str]:
        """Names of the groups of options, for example `model.sampling`."""
        prefixes = {key.rpartition(".")[0] for key in self.options if "." in key}
        return prefixes | {prefix.partition(".")[0] for prefix in prefixes}


def installed_versions() -> dict[str, str]:
    """Return the versions that the options depend on."""
    return {"xpo-lightning": __version__, "lightning": version("lightning")}


def shipped(verb: str) -> KnownOptions | None:
    """Return the options of a verb from the file; None if the verb has none there, or other versions are installed."""
    table = json.loads(FILE.read_text(encoding="utf-8"))
    if verb not in table["verbs"] or table["versions"] != installed_versions():
        return None
    of_verb = table["verbs"][verb]
    classes = {name: ClassOptions(**options) for name, options in table["classes"].items()}
    return KnownOptions({**table["options"], **of_verb["options"]}, of_verb["required"], classes)


def of_parser(parser: Any, only_ours: bool = False) -> KnownOptions:
    """Read the options from the parser of a verb.

    Args:
        parser: The parser.
        only_ours: Leave out the classes of other packages: which there are depends on what has been imported.
    """
    typed = [one for one in parser._actions if hasattr(one, "_typehint") and not one.dest.endswith(".help")]
    classes: dict[str, ClassOptions] = {}
    for action in typed:
        _add_classes(action._typehint, classes, only_ours)
    options = {action.dest: kinds_of(action._typehint) for action in typed}
    return KnownOptions(options, [action.dest for action in typed if action.required], classes)


def as_table(parsers: dict[str, Any]) -> str:
    """Write the table of all verbs."""
    tables = {verb: of_parser(parser, only_ours=True) for verb, parser in parsers.items()}
    first, *others = tables.values()
    shared = {key: kinds for key, kinds in first.options.items() if all(key in one.options for one in others)}
    verbs = {
        verb: {"options": {key: one.options[key] for key in one.options.keys() - shared}, "required": one.required}
        for verb, one in tables.items()
    }
    classes = {name: asdict(options) for name, options in sorted(first.classes.items())}
    table = {"versions": installed_versions(), "options": shared, "verbs": verbs, "classes": classes}
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def _add_classes(hint: Any, classes: dict[str, ClassOptions], only_ours: bool) -> None:
    """Add the classes in a type, and those derived from them, to the table."""
    for base in _classes_in(hint):
        is_ours = base.__module__.startswith(_OURS)
        if base.__name__ in classes or (only_ours and not is_ours):
            continue
        derived = [kind for kind in [base, *_derived(base)] if kind.__module__.startswith(_OURS) or not only_ours]
        named = [kind for kind in derived if not (inspect.isabstract(kind) or kind.__name__.startswith("_"))]
        options = _options_of(base) if is_ours else None
        classes[base.__name__] = ClassOptions(
            options, inspect.isabstract(base), sorted({kind.__name__ for kind in named})
        )
        for kind in named:
            if kind.__module__.startswith(_OURS) and kind.__name__ not in classes:
                classes[kind.__name__] = ClassOptions(_options_of(kind), names=[kind.__name__])


def _classes_in(hint: Any) -> Iterator[type[Any]]:
    if isinstance(hint, type) and f"class {hint.__name__}" in kinds_of(hint):
        yield hint
    for inner in get_args(hint):
        if not isinstance(inner, list):
            yield from _classes_in(inner)


def _derived(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _derived(kind)


def _options_of(kind: type[Any]) -> dict[str, list[str]]:
    if kind not in _OPTIONS_READ:
        _OPTIONS_READ[kind] = {one.name: kinds_of(one.annotation) for one in get_signature_parameters(kind)}
    return _OPTIONS_READ[kind]
