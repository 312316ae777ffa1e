"""Runs the function of `xpo VERB ...`, and answers `--help` and the like without importing torch."""

import ast
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from xpo_lightning import __version__
from xpo_lightning.cli import known_options, mistakes
from xpo_lightning.cli.run_help import run_help
from xpo_lightning.core.argument_parser import OneLineErrors
from xpo_lightning.core.errors import InputError, did_you_mean, exit_with_error
from xpo_lightning.core.recipes import with_config_files

RUNS = {
    "fit": "train",
    "validate": "measure a policy on held-out prompts",
    "predict": "write completions of both sides to a file",
    "check": "look for what would stop a run before it is started",
}
"""Verbs that LightningCLI runs, each with its description; they take the options of a run."""
VERBS = {
    "recipes": "list the configs that come with the package, or copy one",
    "serve": "print or start the vLLM servers of a run",
    "compare": "say how often one policy beats another, with a confidence interval",
    "export": "turn a checkpoint into a folder that transformers loads, or push it to the hub",
    "chat": "talk to a policy and its reference side by side",
    "env": "print the versions and the hardware that a report of a defect needs",
    "plot": "draw the learning curves of runs",
    "report": "write a page about a run",
}
"""The other verbs, each with its description in `xpo --help`."""
LIGHT = ("recipes", "env", "plot", "report")
"""Verbs that need no models, and so start at once."""

BY_PLACE = inspect.Parameter.POSITIONAL_ONLY


class VerbParser(OneLineErrors, ArgumentParser):
    """Parses the arguments of a verb."""


def overview() -> str:
    """Return the text of `xpo --help`."""
    width = max(map(len, (*RUNS, *VERBS)))

    def listed(verbs: dict[str, str]) -> str:
        return "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in verbs.items())

    return (
        "Exploratory Preference Optimization of language models.\n\n"
        f"A run, from a config (xpo fit --config quickstart):\n{listed(RUNS)}\n\n"
        f"Before and after it:\n{listed(VERBS)}\n\n"
        "`xpo VERB --help` has the options of a verb, of a run those that matter most; docs/configuration.md\n"
        "shows all at work, and `xpo fit --config quickstart --print_config` prints them with their\n"
        "values. `xpo --version` prints the version."
    )


def is_answered(words: list[str]) -> bool:
    """Handle `--help`, `--version`, unknown verbs and mistakes in their options without importing torch.

    Args:
        words: The command line.

    Returns:
        Whether the command line was handled.

    Raises:
        InputError: An option of a verb, or the config that it names, is a mistake.
    """
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return True
    if words[0] == "--version":
        print(f"xpo-lightning {__version__}")
        return True
    known = {**RUNS, **VERBS}
    if words[0].startswith("-") and not known.keys() & set(words):
        exit_with_error(f"the verb comes first: xpo fit {' '.join(words):.200} (there are {', '.join(known)})")
    if not words[0].startswith("-") and words[0] not in known:
        exit_with_error(f"there is no verb '{words[0]}'{did_you_mean(words[0], known)} (there are {', '.join(known)})")
    if words[0] in RUNS and {"-h", "--help"} & set(words):
        print(run_help(words[0], RUNS[words[0]]))
        return True
    if words[0] in VERBS:
        _refuse_mistakes(words[0], words[1:])
    return False


def run(verb: str, args: list[str]) -> None:
    """Run a verb.

    Args:
        verb: One of `VERBS`.
        args: The arguments after the verb.
    """
    function = getattr(import_module(f"xpo_lightning.cli.commands.{verb}"), verb)
    parser = parser_of(function)
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if parameter.kind is not BY_PLACE and parameter.annotation == list[str]:
            args = _gathered(args, f"--{name}")
    values = vars(parser.instantiate(parser.parse_args(args)))
    by_place = [values.pop(name) for name, parameter in parameters.items() if parameter.kind is BY_PLACE]
    try:
        function(*by_place, **values)
    except OSError as error:
        if error.filename is None:
            raise
        raise InputError(f"'{error.filename}' cannot be used ({error.strerror})") from error


def options_of(verb: str) -> list[str]:
    """Read the names of a verb's options from its source, since importing it takes seconds."""
    source = Path(__file__).with_name("commands") / f"{verb}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == verb]
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _refuse_mistakes(verb: str, args: list[str]) -> None:
    known = options_of(verb)
    for word in args:
        name = re.split(r"[.=+]", word.removeprefix("--"))[0]
        if word.startswith("--") and name not in (*known, "", "help", "print_config"):
            hint = did_you_mean(name, known) or f" (there are {', '.join(known)})" * bool(known)
            raise InputError(f"`xpo {verb}` has no option '--{name}'{hint}")
    table = known_options.shipped("fit")
    if table is not None and "config" in known:
        for file in with_config_files(args)[1]:
            mistakes.check_config(file, table)


def parser_of(function: Callable[..., Any]) -> VerbParser:
    """Build the parser of a verb from its signature and docstring.

    A positional-only parameter is positional on the command line too, and optional if it has a default; an option that
    is False by default is a flag.
    """
    description = (function.__doc__ or "").partition("\n\n    Args:")[0]
    parser = VerbParser(prog=f"xpo {function.__name__}", description=inspect.cleandoc(description))
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
    for group in parser._action_groups:
        if group.title and description.startswith(group.title):  # The description says it already.
            group.title = "arguments"
    parameters = inspect.signature(function).parameters
    for action in parser._actions:
        parameter = parameters.get(action.dest)
        if parameter is None:
            continue
        optional = parameter.default is not inspect.Parameter.empty
        if parameter.kind is BY_PLACE and optional:
            action.nargs, action.required, action.default = "?", False, parameter.default
        elif parameter.default is False:
            action.nargs, action.const, action.metavar = "?", True, "true"
    _take_several(parser)
    return parser


def _take_several(parser: ArgumentParser) -> None:
    """Accept a list of strings without a default as `RUN [RUN ...]`; jsonargparse would require brackets."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) == list[str]:
            vars(action).update(nargs="+", _typehint=str, metavar=action.dest.removesuffix("s").upper())


def _gathered(args: list[str], option: str) -> list[str]:
    """Put the values of an option that may be given several times behind one: `--config a --config b`."""
    rest, values = list[str](), list[str]()
    into = rest
    for word in args:
        name, _, value = word.partition("=")
        if name == option:
            into = values
            values += [value] * bool(value)
        else:
            into = rest if word.startswith("--") else into
            into.append(word)
    return [*rest, option, *values] if values else args
