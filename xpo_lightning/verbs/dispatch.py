"""From `xpo VERB ...` to the function of that name."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from xpo_lightning.parsing import OneLineErrors

VERBS = {
    "env": "print the versions and the hardware that a report of a defect needs",
    "plot": "draw the learning curves of runs",
    "report": "write a page about a run",
}
"""Each verb, and what it does, as `xpo --help` says it."""


class VerbParser(OneLineErrors, ArgumentParser):
    """The parser of a verb."""


def overview() -> str:
    """Write the part of `xpo --help` that lists the verbs."""
    width = max(map(len, VERBS))
    lines = (f"  {name:{width}}  {purpose}" for name, purpose in VERBS.items())
    return "beside training (see `xpo VERB --help`):\n" + "\n".join(lines)


def run(verb: str, args: list[str]) -> None:
    """Run a verb.

    Args:
        verb: One of `VERBS`.
        args: What was given after it.
    """
    function = getattr(import_module(f"xpo_lightning.verbs.{verb}"), verb)
    parser = parser_of(function)
    function(**vars(parser.instantiate(parser.parse_args(args))))


def parser_of(function: Callable[..., Any]) -> VerbParser:
    """Build the parser of a verb from its signature and docstring."""
    description = (function.__doc__ or "").partition("\n\n")[0]
    parser = VerbParser(prog=f"xpo {function.__name__}", description=description)
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
    _take_several(parser)
    return parser


def _take_several(parser: ArgumentParser) -> None:
    """Let a list of texts without a default be given as `RUN [RUN ...]`; jsonargparse would want brackets."""
    for action in parser._actions:
        if not action.option_strings and getattr(action, "_typehint", None) == list[str]:
            vars(action).update(nargs="+", _typehint=str, metavar=action.dest.removesuffix("s").upper())
