"""What `xpo_lightning` and `xpo_lightning.callbacks` export: documented to the last parameter."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from docstring_parser import parse

import xpo_lightning
import xpo_lightning.callbacks

PLACES = (xpo_lightning, xpo_lightning.callbacks)
EXPORTED = {name: getattr(place, name) for place in PLACES for name in place.__all__}
CLASSES = {name: one for name, one in EXPORTED.items() if inspect.isclass(one)}
PLAIN = {"to", "select", "map"}  # methods of the batch's dataclasses whose one argument their sentence describes
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(function: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [one.name for one in found if one.name != "self" and one.kind not in VARIADIC]


def documented(text: str | None) -> list[str]:
    return [one.arg_name for one in parse(text or "").params if one.args[0] == "param"]


def maker(kind: type) -> type:
    """Name the class whose `__init__` makes a class: the docstring of either has its arguments."""
    return next(one for one in kind.__mro__ if "__init__" in vars(one))


def own_methods() -> Iterator[Any]:
    """Give the public methods that a class of ours is the first to have; others are described where they came from."""
    for name, kind in CLASSES.items():
        for method, function in vars(kind).items():
            first = not any(method in vars(base) for base in kind.__mro__[1:])
            if inspect.isfunction(function) and not method.startswith("_") and first:
                yield pytest.param(function, id=f"{name}.{method}")


def hook_of_lightning(function: Any) -> bool:
    return {"pl_module", "batch_idx"} & set(parameters(function)) != set()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_all_is_sorted_and_whole(place):
    public = {name for name, one in vars(place).items() if not name.startswith("_") and not inspect.ismodule(one)}
    assert set(place.__all__) == public - {"TYPE_CHECKING", "Any", "import_module"}  # what loading on demand needs
    assert len(set(place.__all__)) == len(place.__all__)
    rank = [(name[0].islower(), name) for name in place.__all__]
    assert rank == sorted(rank)


@pytest.mark.parametrize("name", EXPORTED)
def test_export_has_a_docstring_of_its_own(name):
    text = EXPORTED[name].__dict__.get("__doc__") if name in CLASSES else EXPORTED[name].__doc__
    assert parse(text or "").short_description
    assert not text.startswith(f"{name}("), "a dataclass writes such a one itself"


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_of_a_class_are_those_of_its_docstring(name):
    kind = CLASSES[name]
    made_by = maker(kind)
    if not made_by.__module__.startswith("xpo_lightning"):  # Lightning's, or nobody's: not ours to describe
        assert documented(kind.__doc__) == []
        return
    described = documented(kind.__doc__) or documented(made_by.__doc__)
    assert described == parameters(made_by.__init__)


@pytest.mark.parametrize("function", list(own_methods()))
def test_arguments_of_a_method_are_those_of_its_docstring(function):
    assert function.__doc__
    if not hook_of_lightning(function) and function.__name__ not in PLAIN:
        assert documented(function.__doc__) == parameters(function)


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - CLASSES.keys()))
def test_arguments_of_a_function_are_those_of_its_docstring(name):
    function = EXPORTED[name]
    assert documented(function.__doc__) == parameters(function)


def test_each_class_that_a_config_can_name_is_exported_under_its_name():
    kinds = [xpo_lightning.Reward, xpo_lightning.Judge, xpo_lightning.Sampler, xpo_lightning.PreferenceLoss]
    kinds += [xpo_lightning.Schedule, xpo_lightning.RolloutEngine, xpo_lightning.Bonus]
    for kind in kinds:
        for one in every_subclass(kind):
            if one.__module__.startswith("xpo_lightning.") and not inspect.isabstract(one):
                assert EXPORTED.get(one.__name__) is one


def every_subclass(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from every_subclass(one)


@pytest.mark.parametrize(("old", "new"), [("Desk", "RolloutContext"), ("Asked", "GenerationRequest")])
def test_names_of_earlier_versions_work_and_say_what_they_are_called_now(old: str, new: str):
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        assert getattr(xpo_lightning, old) is getattr(xpo_lightning, new)
