"""Writes docs/reference.md, all options of a config, and the table of them that `xpo` reads before it imports torch."""

import argparse
import collections.abc
import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse

import xpo_lightning as xpo
from xpo_lightning import callbacks
from xpo_lightning.cli import dispatch, known_options
from xpo_lightning.cli.lightning_cli import XPOCLI
from xpo_lightning.cli.run_defaults import TRAINER_DEFAULTS, RunDefaults

PAGE = Path(__file__).parents[1] / "reference.md"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable"
OPENING = """# Options

Every option of `xpo fit`, `xpo validate` and `xpo predict`, with its type and its default, as the code has them.
[Configuration](configuration.md) shows at work what says which completion is better, and the rest of the algorithm.
This page is written by `python docs/tools/reference.py`.

| group | what it is |
| --- | --- |
| [model](#model) | the algorithm, the models, the optimizer |
| [data](#data) | the prompts |
| [trainer](#trainer) | Lightning's trainer: devices, precision, length, validation, callbacks |
| [defaults](#defaults) | what every run shows and leaves, unless it is switched off |
| [the run](#the-run) | seed, checkpoint, config files |

An option that takes a class is given by `class_path` and `init_args`, or by the class's name alone. The classes of this
package are below, under the option that takes them; one of your own has its import path, see
[Extending](extending.md). A key is also an option of the command line: `--model.alpha 0`.

"""
GROUPS = {"policy": xpo.ModelSpec, "lora": xpo.LoRASpec, "sampling": xpo.Sampling, "candidates": xpo.Candidates}
GROUPS |= {"labels": xpo.LabelRule, "buffer": xpo.BufferOptions, "reference_refresh": xpo.ReferenceRefresh}
CLASSES = {
    "model.reward: rewards": [xpo.Reward],
    "model.reward: judges": [xpo.Judge],
    "model.sampler": [xpo.Sampler],
    "model.preference_loss": [xpo.PreferenceLoss],
    "model.bonus": [xpo.Bonus],
    "model.alpha and model.beta: schedules": [xpo.Schedule],
    "model.rollout": [xpo.RolloutEngine],
}
OTHER_DEFAULTS = ", ".join(f"`trainer.{key}: {yaml.safe_dump(value)[:-5]}`" for key, value in TRAINER_DEFAULTS.items())
TRAINER = f"""## trainer

All [options of Lightning's trainer]({LIGHTNING}/common/trainer.html#trainer-flags). Three are refused, because the
module takes its optimizer steps itself:

| instead of | take |
| --- | --- |
| `trainer.gradient_clip_val`, `trainer.gradient_clip_algorithm` | `model.max_grad_norm` |
| `trainer.accumulate_grad_batches` | `data.batch_size` and `model.micro_batch_size` |

`trainer.precision` is `32-true` or `bf16-mixed`. `trainer.max_steps` counts optimizer steps, and
`trainer.val_check_interval` batches.
Other defaults than Lightning's: {OTHER_DEFAULTS}.

The classes of this package for the trainer, beside
[Lightning's callbacks]({LIGHTNING}/extensions/callbacks.html) and [loggers]({LIGHTNING}/extensions/logging.html):

"""
RUN = """## the run

| key | type | default | what it does |
| --- | --- | --- | --- |
| `config` | file | | A YAML file; given several times, each lies over those before it. |
| `seed_everything` | int or true or false | `0` | Seed of all randomness, the samples' too; `true` draws one. |
| `ckpt_path` | text | `null` | Checkpoint to go on from (`fit`) or to look at; `last` is the newest that is whole. |
| `import_from` | list of text or null | `null` | Further folders to import from; a saved config has those of its run. |
| `print_config` | flag | | Prints the whole config, defaults and all, and ends. |
"""


def maker(kind: type) -> type:
    """Name the class whose `__init__` makes a class."""
    return next(one for one in kind.__mro__ if "__init__" in vars(one))


def described(kind: type) -> dict[str, str]:
    """Give what docstrings say of a class's arguments."""
    texts = [kind.__doc__, maker(kind).__doc__]
    found = [{one.arg_name: one.description for one in parse(text or "").params} for text in texts]
    return {name: " ".join((text or "").split()) for name, text in {**found[1], **found[0]}.items()}


def type_name(hint: Any) -> str:
    """Say in words what an option takes."""
    origin, inner = get_origin(hint), get_args(hint)
    simple = {bool: "true or false", int: "int", float: "float", str: "text", type(None): "null", Any: "any"}
    if hint in simple:
        return simple[hint]
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(one) for one in inner))
    if origin is collections.abc.Callable:
        made = str(inner[-1])
        return "optimizer" if "Optimizer" in made else "scheduler" if "Scheduler" in made else "import path"
    if origin in (list, collections.abc.Sequence):
        return f"list of {type_name(inner[0])}"
    if origin is dict or hint is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return f"options of {hint.__name__}"
    return f"`{hint.__name__}`"


def shown(value: Any) -> str:
    """Write a default as YAML does."""
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, timedelta):
        return f"`{value}`"
    if isinstance(value, str) and chr(10) in value:
        return "a text of its own"
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def defaults(kind: type) -> Iterator[tuple[str, Any]]:
    """Give each argument of a class, and its default."""
    for name, parameter in inspect.signature(maker(kind).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = parameter.default
        if dataclasses.is_dataclass(kind):
            field = {one.name: one for one in dataclasses.fields(kind)}[name]
            value = value if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield name, value


def table(kind: type, prefix: str, links: dict[str, str] | None = None) -> str:
    """Write the options of a class as a table."""
    hints, texts = get_type_hints(maker(kind).__init__), described(kind)
    rows = ["| key | type | default | what it does |", "| --- | --- | --- | --- |"]
    for name, value in defaults(kind):
        text = re.sub(r"\bNone\b", "null", texts[name]).replace("|", "\\|").replace("<", "&lt;")
        kinds = (links or {}).get(name) or type_name(hints[name])
        rows.append(f"| `{prefix}{name}` | {kinds} | {shown(value)} | {text} |")
    return "\n".join(rows) + "\n\n"


def summary(kind: type) -> str:
    """Give the first sentence of a class."""
    return f"{parse(kind.__doc__ or '').short_description}\n\n"


def subclasses(kind: type) -> list[type]:
    """List the classes of this package that an option can name, in alphabetical order."""
    found = [
        one for one in (getattr(xpo, name) for name in xpo.__all__) if inspect.isclass(one) and issubclass(one, kind)
    ]
    return [one for one in found if not inspect.isabstract(one)]


def section(kind: type) -> str:
    """Write a class's section."""
    text, made_by = f"#### {kind.__name__}\n\n{summary(kind)}", maker(kind)
    parameters = inspect.signature(made_by.__init__).parameters.values()
    takes_all = made_by is not object and any(one.kind is one.VAR_KEYWORD for one in parameters)
    of_lightning = made_by if made_by.__module__.startswith("lightning.") else kind.__mro__[1]
    if of_lightning.__module__.startswith("lightning.") and (takes_all or of_lightning is made_by):
        return f"{text}Takes the options of Lightning's `{of_lightning.__name__}`.\n\n"
    has_options = made_by.__module__.startswith("xpo_lightning") and bool(list(defaults(kind)))
    return text + (table(kind, "") if has_options else "")


def model() -> str:
    """Write the section of `model`."""
    links = {name: f"[its options](#model{name})" for name in GROUPS}
    links |= {"reward": "[a reward](#modelreward-rewards) or [a judge](#modelreward-judges)"}
    links |= {"sampler": "[a sampler](#modelsampler) or null", "rollout": "[an engine](#modelrollout) or null"}
    links |= {"preference_loss": "[a loss](#modelpreference_loss) or null"}
    links |= dict.fromkeys(
        ("alpha", "beta"), "float, list of float, or [a schedule](#modelalpha-and-modelbeta-schedules)"
    )
    text = f"## model\n\n{table(xpo.XPOLightningModule, 'model.', links)}"
    for name, kind in GROUPS.items():
        text += f"### model.{name}\n\n{summary(kind)}{table(kind, f'model.{name}.')}"
    for title, kinds in CLASSES.items():
        text += f"### {title}\n\n" + "".join(section(one) for kind in kinds for one in subclasses(kind))
    return text


def trainer() -> str:
    """Write the section of `trainer`."""
    shown_callbacks = [one for one in map(callbacks.__dict__.get, callbacks.__all__) if inspect.isclass(one)]
    text = TRAINER + "### trainer.callbacks\n\n" + "".join(map(section, shown_callbacks))
    text += "### trainer.logger\n\n" + section(xpo.ResumableCSVLogger)
    text += "### trainer.strategy\n\n" + section(xpo.FSDP2Strategy)
    return text + "### trainer.plugins\n\n" + section(xpo.CrashSafeCheckpointIO)


def run_defaults() -> str:
    """Write the section of `defaults`."""
    text = parse(RunDefaults.__doc__ or "")
    return f"## defaults\n\n{text.short_description} {text.long_description}\n\n{table(RunDefaults, 'defaults.')}"


def page() -> str:
    """Write the page."""
    return OPENING + model() + f"## data\n\n{table(xpo.PromptDataModule, 'data.')}" + trainer() + run_defaults() + RUN


class _Parsers(XPOCLI):
    """Builds the parsers of a run, and stops there."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise StopIteration({verb: self._parser(verb) for verb in dispatch.RUNS})


def options_table() -> str:
    """Write the table of the options and their kinds of value."""
    try:
        _Parsers([])
    except StopIteration as stopped:
        return known_options.as_table(stopped.value)
    raise AssertionError


def _arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Write the page, or tell whether it is up to date."""
    check = _arguments(words).check
    for file, text in {PAGE: page(), known_options.FILE: options_table()}.items():
        if not check:
            file.write_text(text)
        elif file.read_text() != text:
            print(f"{file.name} is out of date; run `python docs/tools/reference.py`", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
