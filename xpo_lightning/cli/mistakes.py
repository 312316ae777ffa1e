"""Finds mistakes in what a user wrote, before anything is imported or loaded, and says where they stand."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from xpo_lightning.cli.config_text import COMMAND_LINE, Place, entries, read_config
from xpo_lightning.cli.known_options import ClassOptions, KnownOptions
from xpo_lightning.core.errors import InputError, did_you_mean
from xpo_lightning.core.option_kinds import classes_in, elements_of, in_words, takes_word
from xpo_lightning.core.paths import existing_path

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WITHOUT_VALUE = ("help", "h", "help_all", "print_config", "version")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_HAS_PLACE = re.compile(r"\((in .+, line \d+|on the command line)\)")
_OTHER_NAMES = {
    "lr": "model.learning_rate",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "output_dir": "trainer.default_root_dir",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "model.micro_batch_size",
    "warmup": "model.warmup_ratio",
    "model_name_or_path": "model.policy.path",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "reward_model_path": "model.reward",
    "seed": "seed_everything",
    "resume_from_checkpoint": "ckpt_path",
}
"""What other trainers call an option."""


class Written:
    """What a user wrote on the command line and in the configs that it names.

    Args:
        known: The options that there are.
        verb: The verb of the command line.

    Attributes:
        places: Where each key stands; of several places the last, whose value counts.
    """

    def __init__(self, known: KnownOptions, verb: str) -> None:
        self.known, self.verb = known, verb
        self.places: dict[str, Place] = {}
        self._values: dict[str, str] = {}
        self._classes: dict[str, str] = {}  # the class that is named under a key
        self._has_other_files = False

    def read(self, words: Sequence[str]) -> None:
        """Read the words after the verb.

        Raises:
            InputError: One of them, or something in a config, is a mistake; the message says where it stands.
        """
        is_help = False
        for option, value, place in _options(words):
            if option is None:
                self._check_stray_word(str(value))
                self._has_other_files = True  # A run's folder, with a config of its own; or the parser refuses it.
            elif option in ("config", "c"):
                self.read_config_file(value or "")
            elif option.split(".")[-1] in _WITHOUT_VALUE:
                is_help = True
            else:
                self._read_option(option, value, place)
        if not is_help and not self._has_other_files:
            self._check_required()

    def place_of(self, key: str) -> Place | None:
        """Return where a key, or the option of a class that it belongs to, was written."""
        key, base = _short(key), self._class_key(key)
        while len(key) > len(base) and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key) if base else None

    def full_key(self, key: str) -> str:
        """Return a key as it is, or with all before it if it is the last part of one that was written."""
        ends = [one for one in self.places if one.endswith(f".{key}")]
        return ends[0] if len(ends) == 1 and "." not in key else key

    def key_of(self, path: str) -> str:
        """Return the last key whose value is a path, or a folder that holds it."""
        keys = [key for key, value in self._values.items() if "/" in value and f"{path}/".startswith(f"{value}/")]
        return keys[-1] if keys else ""

    def read_config_file(self, name: str) -> None:
        """Read a config: a file, or YAML itself."""
        path = existing_path(name)
        if path is not None and not path.is_file():
            self._has_other_files = True  # The parser refuses a folder.
        else:
            text, source = (name, "--config") if path is None else (_text_of(path), name)
            if path is not None or "\n" in text or text.lstrip().startswith("{"):
                self._read_group(read_config(text, source), source, "")

    def _read_group(self, node: yaml.MappingNode, source: str, group: str) -> None:
        for name, place, value in entries(node, source):
            key = f"{group}.{name}".removeprefix(".")
            if name != "<<":
                self._read_value(key, value, place)

    def _read_option(self, option: str, value: str | None, place: Place) -> None:
        key = option.removesuffix("+")
        self._refuse_unknown(key, place)
        if value is None:
            raise InputError(f"--{option} needs a value ({place}), and none follows it: --{option} VALUE")
        self._read_value(key, _node_of(value), place)

    def _read_value(self, key: str, value: yaml.Node, place: Place) -> None:
        self._refuse_unknown(key, place)
        self.places[_short(key)] = place
        self._values[_short(key)] = str(value.value)
        if key in self.known.options:
            self._check_value(key, self.known.options[key], value, place)
        elif key in self.known.groups:
            if isinstance(value, yaml.MappingNode):
                self._read_group(value, place.source, key)
            else:
                self._check_group(key, value, place)
        else:
            self._check_inner_value(key, value, place)

    def _check_group(self, key: str, value: yaml.Node, place: Place) -> None:
        """Refuse a value in place of a group of options; the name of a file is one."""
        if isinstance(value, yaml.ScalarNode) and value.value and existing_path(value.value) is not None:
            self._has_other_files = True
            return
        path = f"{key}.path" if f"{key}.path" in self.known.options else ""
        hint = f"; to name a model, set {path}" if path and isinstance(value, yaml.ScalarNode) else ""
        raise InputError(f"{key} must be a group of options, but is {_shown(value)} ({place}){hint}")

    def _check_inner_value(self, key: str, value: yaml.Node, place: Place) -> None:
        """Check an option of a class, such as `model.reward.init_args.path`."""
        base = self._class_key(key)
        name = key.removeprefix(f"{base}.").removeprefix("init_args.")
        if name == "class_path" and isinstance(value, yaml.ScalarNode):
            self._take_class(base, self.known.options[base], value.value, place)
        options = self._options_under(base)
        if options is not None and name in options:
            self._check_value(key, options[name], value, place)

    def _check_value(self, key: str, kinds: list[str], value: yaml.Node, place: Place) -> None:
        names = classes_in(kinds)
        fits = "any" in kinds
        if isinstance(value, yaml.MappingNode):
            fits = fits or bool(names) or "mapping" in kinds
            if names:
                self._check_class(key, kinds, value, place)
        elif isinstance(value, yaml.SequenceNode):
            self._classes = {name: one for name, one in self._classes.items() if not name.startswith(f"{key}[")}
            elements = elements_of(kinds)
            fits = fits or bool(elements)
            for number, element in enumerate(value.value if elements else []):
                line = None if place.line is None else element.start_mark.line + 1
                self._check_value(f"{key}[{number}]", elements, element, Place(place.source, line))
        elif value.tag.endswith(":null"):
            return  # The parser's business: an option with a default of null takes it.
        elif takes_word(kinds, value.value) or fits:
            return
        elif names and value.value and not takes_word(["int", "float", "bool"], value.value):
            self._take_class(key, kinds, value.value, place)
            return
        if not fits:
            raise InputError(f"{key} must be {in_words(kinds)}, but is {_shown(value)} ({place}){self._fields(kinds)}")

    def _fields(self, kinds: list[str]) -> str:
        """Name the options of a class that needs no name."""
        (name, *_) = [*classes_in(kinds), ""]
        options = self.known.classes[name].options if name in self.known.classes else None
        return f"; its options are {', '.join(options)}" if options and self._has_default_class(kinds) else ""

    def _check_class(self, key: str, kinds: list[str], node: yaml.MappingNode, place: Place) -> None:
        """Check `class_path` and `init_args`, or the options of a class that needs no name."""
        given = {name: (where, value) for name, where, value in entries(node, place.source)}
        if "class_path" in given:
            where, value = given["class_path"]
            self._take_class(key, kinds, str(value.value), where)
        if key not in self._classes and not self._has_default_class(kinds):
            names = self._listed(kinds)
            known = f": one of {names}, or the import path of your own" if names else ""
            raise InputError(f"{key} needs a class_path ({place}){known}; its options stand under init_args beside it")
        for name, (where, value) in given.items():
            inner = key if name in ("init_args", "dict_kwargs") else f"{key}.{name}"
            if name == "init_args" and isinstance(value, yaml.MappingNode):
                self._check_fields(key, value, place.source)
            elif name not in _CLASS_KEYS:
                if "class_path" in given:
                    raise InputError(f"{inner} stands beside class_path ({where}), and must stand under init_args")
                self._check_fields(key, node, place.source)
                return

    def _check_fields(self, key: str, node: yaml.MappingNode, source: str) -> None:
        options = self._options_under(key)
        if options is None:
            return
        for name, place, value in entries(node, source):
            if name not in options and name != "<<":
                raise _unknown(f"{key}.{name}", place, _closest(name, options))
            if name in options:
                self.places[f"{key}.{name}"] = place
                self._values[f"{key}.{name}"] = str(value.value)
                self._check_value(f"{key}.{name}", options[name], value, place)

    def _take_class(self, key: str, kinds: list[str], name: str, place: Place) -> None:
        """Take note of the class that is named under a key; refuse a name that no class has."""
        names = self._names(kinds)
        is_file = existing_path(name) is not None
        if names and "." not in name and name not in names and not is_file:
            hint = did_you_mean(name, names) or f"; the classes are {self._listed(kinds)}" * bool(self._listed(kinds))
            raise InputError(f"{key} must be {in_words(kinds)}, but is '{name}' ({place}){self._fields(kinds) or hint}")
        self._classes[key] = "" if is_file else name.rpartition(".")[2]

    def _names(self, kinds: list[str]) -> list[str]:
        """Return the names of the classes that can be given, or none if not all of them are known."""
        known = [self.known.classes.get(name) for name in classes_in(kinds)]
        return [] if None in known else sorted({name for one in known if one for name in one.names})

    def _listed(self, kinds: list[str]) -> str:
        """List the classes that can be given, or nothing if nobody would read so many; of ours those of the package."""
        names = [name for name in self._names(kinds) if not name.startswith("_")]
        if all(self._is_ours(base) for base in classes_in(kinds)):
            names = [name for name in names if self._is_ours(name)]
        return ", ".join(names) if len(names) <= 16 else ""

    def _is_ours(self, name: str) -> bool:
        return self.known.classes.get(name, ClassOptions()).options is not None

    def _has_default_class(self, kinds: list[str]) -> bool:
        """Tell whether the options of a class can stand without its name."""
        found = [self.known.classes.get(name, ClassOptions()) for name in classes_in(kinds)]
        return any(one.options and not one.is_abstract for one in found)

    def _class_key(self, key: str) -> str:
        """Return the option that an inner key belongs to: `model.reward` of `model.reward.init_args.path`."""
        while key and key not in self.known.options:
            key = key.rpartition(".")[0]
        return key

    def _options_under(self, key: str) -> dict[str, list[str]] | None:
        """Return what the class under a key takes, or None if that is not known: another file may name the class."""
        if self._has_other_files and key not in self._classes:
            return None
        (base, *_) = [*classes_in(self.known.options.get(key, [])), ""]
        found = self.known.classes.get(self._classes.get(key, base))
        return None if found is None else found.options

    def _refuse_unknown(self, key: str, place: Place) -> None:
        if key in self.known.options or key in self.known.groups:
            return
        base = self._class_key(key)
        if not base:
            raise _unknown(key, place, self._suggest(key))
        kinds = self.known.options[base]
        if "mapping" in kinds or "any" in kinds:
            return
        if not classes_in(kinds):
            raise _unknown(key, place, f"; {base} takes {in_words(kinds)}")
        name = key.removeprefix(f"{base}.").removeprefix("init_args.").split(".")[0]
        options = self._options_under(base)
        if options is not None and name not in options and name not in _CLASS_KEYS:
            raise _unknown(key, place, _closest(name, options))

    def _suggest(self, key: str) -> str:
        """Say what was probably meant by a key."""
        known, word = [*self.known.options, *self.known.groups], key.replace("-", "_")
        group, _, leaf = word.rpartition(".")
        parts = word.split(".")
        ends = [".".join(parts[start:]) for start in range(1, len(parts))]
        inside = next((end for end in ends if end in self.known.groups), None)
        if inside is not None:
            return f"; '{inside}' is no part of {group}: write it at the beginning of a line, as its own group"
        if word not in known:
            same = [one for one in known if one.rpartition(".")[2] == leaf]
            siblings = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == group}
            close = [siblings[name] for name in get_close_matches(leaf, siblings, 1)]
            found = [*(end for end in ends if end in known), *same, *close, *get_close_matches(word, known, 1)]
            word = _OTHER_NAMES.get(leaf, "") or next(iter(found), "")
        return f"; did you mean '{word}'?" if word in known else ""

    def _check_stray_word(self, word: str) -> None:
        """Refuse an option without its dashes; other words are left to the parser."""
        if word.startswith("-"):
            raise InputError(f"{word}: an option begins with two dashes: -{word} (on the command line)")
        name, equals, value = word.partition("=")
        key = name.replace("-", "_")
        hint = self._suggest(key)
        if key in self.known.options:
            raise InputError(f"{word}: an option begins with two dashes: --{key}{equals}{value} (on the command line)")
        if equals or (hint and key in {one.rpartition(".")[2] for one in self.known.options}):
            raise InputError(f"{word}: an option begins with two dashes, --KEY VALUE (on the command line){hint}")

    def _check_required(self) -> None:
        required = self.known.required
        if self.place_of("data.preferences") is None:  # Alone, it stands in for both.
            required = [*required, "model.reward", "data.source"]
        lacking = [key for key in required if self.place_of(key) is None]
        if lacking:
            config = "" if self.places else f" No config is given: `xpo {self.verb} --config quickstart` is one to try."
            raise InputError(
                f"nothing says what {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'}; "
                f"set it in a config, or on the command line.{config}"
            )


def _options(words: Sequence[str]) -> Iterator[tuple[str | None, str | None, Place]]:
    """Yield each option of a command line with its value; a word that belongs to none comes with None for option."""
    left = list(words)
    while left:
        word = left.pop(0)
        is_option = word.startswith("--") or word in ("-h", "-c") or word.startswith("-c=")
        if not is_option:
            yield None, word, COMMAND_LINE
            continue
        option, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield option, value, COMMAND_LINE
        elif left and (not left[0].startswith("-") or NEGATIVE_NUMBER.fullmatch(left[0]) or " " in left[0]):
            yield option, None if option in _WITHOUT_VALUE else left.pop(0), COMMAND_LINE
        else:
            yield option, None, COMMAND_LINE


def _node_of(value: str) -> yaml.Node:
    """Read a value of the command line, which is YAML."""
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        node = None
    return node or yaml.ScalarNode("tag:yaml.org,2002:str", value)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {path} is not valid UTF-8 ({error}); save it as UTF-8") from error


def _unknown(key: str, place: Place, hint: str) -> InputError:
    return InputError(f"there is no option '{key}' ({place}){hint}")


def _closest(name: str, options: Iterable[str]) -> str:
    known = ", ".join(options)
    return did_you_mean(name, options) or (f"; there are {known}" if known else "")


def _shown(value: yaml.Node) -> str:
    if isinstance(value, yaml.ScalarNode):
        return f"'{value.value:.60}'" if value.tag.endswith(":str") else value.value or "null"
    return "a list" if isinstance(value, yaml.SequenceNode) else "a group of options"


def _short(key: str) -> str:
    return key.replace(".init_args", "").removesuffix(".class_path")


_last: list[Written] = []


def check(words: Sequence[str], known: KnownOptions) -> None:
    """Check a command line that begins with a verb, and the configs that it names.

    Raises:
        InputError: There is a mistake; the message says where it stands.
    """
    _last[:] = [Written(known, words[0])]
    _last[0].read(words[1:])


def check_config(file: str, known: KnownOptions) -> None:
    """Check the config of a run that a verb only looks at, as `compare` does.

    Raises:
        InputError: There is a mistake; the message says where it stands.
    """
    _last[:] = [Written(known, "fit")]
    _last[0].read_config_file(file)


def with_place(message: str) -> str:
    """Add to an error that begins with a key where the user wrote that key."""
    key = re.match(r"[a-z_]+(\.\w+)+|[a-z_]+(?=:)", message)
    path = re.match(r"'(.+?)'", message)
    if not _last or _HAS_PLACE.search(message):
        return message
    name = _last[0].full_key(key[0]) if key else _last[0].key_of(path[1]) if path else ""
    place = _last[0].place_of(name)
    if place is None:
        return message
    return f"{name + message[key.end() :] if key else message} ({name} stands {place})"
