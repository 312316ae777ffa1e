"""Imports inside the package point one way, and its files stay small and named for what they do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import xpo_lightning

PACKAGE = Path(xpo_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE).with_suffix("")) for file in FILES]
LONGEST = 300  # lines

# What a room may import of ours, itself excepted. A folder is one room.
MAY_IMPORT = {
    "errors": set(),
    "batch": {"errors"},
    "losses": {"batch", "errors", "preference_losses"},
    "preference_losses": {"batch", "errors"},
    "preference": {"batch", "errors"},
    "schedules": {"batch", "errors"},
    "candidates": {"batch", "errors"},
    "forward": {"batch", "errors", "sharding"},
    "logps": {"batch", "errors", "forward", "sharding"},
    "objective": {"batch", "errors", "logps", "losses", "metrics", "preference_losses", "schedules"},
    "loading": {"errors", "forward"},
    "identity": set(),
    "phases": set(),
    "versions": set(),
    "environment": {"errors"},
    "guard": {"batch", "complaints", "errors"},
    "sharding": {"errors"},
    "owner": set(),
    "atomic_files": {"errors", "owner"},
    "run_folder": {"atomic_files", "errors", "guard", "owner"},
    "strategies": {"run_folder"},
    "complaints": {"errors"},
    "parsing": {"errors"},
    "recipes": {"errors", "loading"},
    "footprint": {"forward"},
    "reporting": {"__version__", "atomic_files", "errors"},
    "sqlite_file": {"errors"},
    "buffer": {"atomic_files", "batch", "errors", "sqlite_file"},
    "snapshot": {"errors", "forward"},
    "reference": {"errors", "forward", "identity", "snapshot"},
    "reference_cache": {"batch", "errors", "guard", "identity", "rollout", "sqlite_file"},
    "rollout": {"batch", "errors", "forward", "guard", "logps", "rewards"},
    "desk": {"batch", "forward", "phases", "reference_cache", "rollout"},
    "samplers": {"batch", "desk", "errors", "rewards", "snapshot"},
    "memory": {"buffer", "errors", "reference", "reference_cache", "samplers"},
    "resume": {"errors", "guard", "identity", "memory"},
    "verdicts": {"batch", "errors", "guard", "phases", "preference", "rewards"},
    "updates": {"batch", "errors", "rollout"},
    "gradient": {"batch", "errors", "forward", "guard", "objective", "optimization", "phases", "sharding", "updates"},
    "combinations": {"buffer", "candidates", "errors", "models", "reference", "rewards", "rollout", "samplers"},
}
VERB_ROOMS = {"comparing", "recipes", "saved", "start"}
TOP = {"module", "steps", "planning", "overview", "callbacks", "checking", "check", "verbs", "cli", *VERB_ROOMS}
MAY_NOT_IMPORT = {
    "rewards": TOP | {"models"},
    "data": TOP | {"models"},
    "prompts": TOP | {"models"},
    "models": TOP,
    "metrics": TOP,
    "collector": TOP,
    "optimization": TOP,
    "checkpoint": TOP,
    "embedded": TOP,
    "steps": TOP - {"steps"},
    "module": {"callbacks", "check", "checking", "cli", "run_folder", *VERB_ROOMS},
    "planning": TOP - {"module", "planning"},
    "overview": TOP - {"module", "planning", "overview"},
    "callbacks": {"checking", "check", "verbs", "cli", *VERB_ROOMS},
    "checking": {"check", "verbs", "cli", *VERB_ROOMS},
    "check": {"verbs", "cli", *VERB_ROOMS},
    "saved": {"callbacks", "checking", "check", "comparing", "verbs", "cli", "start"},
    "comparing": {"callbacks", "checking", "check", "verbs", "cli", "start"},
    "verbs": {"cli", "start"},
    "cli": {"start"},
}


def room(module: str) -> str:
    """Name the room of a dotted module name: `xpo_lightning.rewards.base` is in `rewards`."""
    return [*module.split("."), "__init__"][1]


def top(name: str) -> str:
    """Name the room of a file: `rewards/base` is in `rewards`."""
    return name.partition("/")[0]


def imported(file: Path) -> Iterator[str]:
    """Yield the dotted names of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(name: str) -> set[str]:
    """Collect the rooms that a file imports, its own left out."""
    ours = [module for module in imported(PACKAGE / f"{name}.py") if f"{module}.".startswith("xpo_lightning.")]
    return {room(module) for module in ours} - {top(name)}


def test_import_reader_sees_every_form_of_import(tmp_path: Path):
    file = tmp_path / "one.py"
    file.write_text("import a.b\nfrom c.d import e, f\ndef g():\n    from h import i\n    import j as k\n")
    assert sorted(imported(file)) == ["a.b", "c.d.e", "c.d.f", "h.i", "j"]
    assert room("xpo_lightning.rewards.base.Reward") == "rewards"


def test_every_ruled_room_exists():
    rooms = {top(name) for name in NAMES}
    assert MAY_IMPORT.keys() <= rooms
    assert MAY_NOT_IMPORT.keys() - {"callbacks"} <= rooms


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name: str):
    own, imports = top(name), imports_of(name)
    assert not imports - MAY_IMPORT.get(own, imports)
    assert not imports & MAY_NOT_IMPORT.get(own, set())
    if own != "__init__":
        assert "__init__" not in imports, "import from the file itself, not from the package"


def test_imports_make_no_circle():
    graph: dict[str, set[str]] = {}
    for name in NAMES:
        graph.setdefault(top(name), set()).update(imports_of(name))
    finished: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join([*path, node])
        if node not in finished:
            for other in sorted(graph.get(node, set())):
                visit(other, (*path, node))
            finished.add(node)

    for node in sorted(graph):
        visit(node, ())


@pytest.mark.parametrize("name", NAMES)
def test_file_is_short_and_named_for_its_job(name: str):
    assert Path(name).name not in {"utils", "util", "helpers", "helper", "common", "misc"}
    lines = (PACKAGE / f"{name}.py").read_text().count("\n")
    assert lines <= LONGEST
