"""The rooms of the package stand in one order: each may import only what its line names, all of it further down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import xpo_lightning

PACKAGE = Path(xpo_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE).with_suffix("")) for file in FILES]
LONGEST_FUNCTION = 80  # lines

# From the bottom up. A folder is one room, and so is a file at the top; `__version__` is all that `__init__` lends.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "losses": {"core"},
    "models": {"core"},
    "data": {"core"},
    "rollout": {"core", "models"},
    "rewards": {"core", "models", "data"},
    "training": {"core", "models", "losses", "rollout", "rewards"},
    "checkpointing": {"core", "training"},
    "strategies": {"checkpointing"},
    "module": {"core", "models", "data", "losses", "rollout", "rewards", "training", "checkpointing"},
    "reporting": {"core", "models", "data", "losses", "rollout", "rewards", "module", "__version__"},
    "callbacks": {"core", "models", "training", "checkpointing", "module", "reporting"},
    "evaluation": {"core", "models", "data", "rollout", "rewards", "checkpointing", "module"},
    "cli": {
        *{"core", "models", "data", "losses", "rollout", "rewards", "training", "checkpointing", "module"},
        *{"reporting", "callbacks", "evaluation", "strategies", "embedded", "__version__"},
    },
    "embedded": set(),
    "__main__": {"cli"},
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


def test_there_are_these_rooms_and_no_others():
    assert {top(name) for name in NAMES} - {"__init__"} == ROOMS.keys()
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 18


def test_each_room_imports_only_rooms_below():
    below: set[str] = {"__version__", "embedded"}
    for name, imports in ROOMS.items():
        assert imports <= below, name
        below.add(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__"])
def test_imports_are_those_of_the_room(name: str):
    assert imports_of(name) <= ROOMS[top(name)]


def test_files_import_each_other_in_no_circle():
    graph = {}
    for name, file in zip(NAMES, FILES, strict=True):
        inner = [module.removeprefix("xpo_lightning.").replace(".", "/") for module in imported(file)]
        graph[name] = {found for one in inner for found in (one, one.rpartition("/")[0]) if found in NAMES} - {name}
    finished: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join([*path, node])
        if node not in finished:
            for other in sorted(graph[node]):
                visit(other, (*path, node))
            finished.add(node)

    for node in NAMES:
        visit(node, ())


def test_embedded_assets_come_without_code():
    """What builds them is in `tools/`, so that no run and no wheel carries it."""
    (file,) = (PACKAGE / "embedded").rglob("*.py")
    (docstring,) = ast.parse(file.read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("name", NAMES)
def test_functions_fit_a_screen_and_files_are_named_for_their_job(name: str):
    assert Path(name).name not in {"utils", "util", "helpers", "helper", "common", "misc"}
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno
            assert lines <= LONGEST_FUNCTION or node.name == "__init__", node.name
