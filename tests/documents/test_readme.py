"""Each command and each Python example of README and docs is parsed or run."""

import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_configs import parse

from xpo_lightning.cli.dispatch import VERBS, parser_of
from xpo_lightning.cli.lightning_cli import LOOKING

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", BENCHMARKS / "README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TOOLS = ("mkdocs", "ruff", "mypy", "codespell", "pre-commit")
TEST_LINE = "pip install -q -c constraints.txt -e '.[dev]' && python -m pytest -q -n 2"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def check_pip(words: list[str]) -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    pins = (ROOT / "constraints.txt").read_text()
    for option, value in pairwise(words):
        assert option != "-c" or (ROOT / value).is_file()
    for word in words:
        extras = re.fullmatch(r"\.\[(.+)\]", word)
        assert extras is None or set(extras[1].split(",")) <= known
    assert "-c" in words or "--no-deps" in words, "an install that takes no pins"
    for name in (word for word in words[2:] if re.fullmatch(r"[a-z]+", word)):
        assert re.search(rf"^{name}==", pins, re.MULTILINE), f"{name} is not pinned"


def check_run(words: list[str], checkpoint: Path) -> None:
    """Parse a command; a checkpoint it names is one that an earlier command leaves."""
    if words[0] in VERBS:
        verb = getattr(importlib.import_module(f"xpo_lightning.cli.commands.{words[0]}"), words[0])
        parser_of(verb).parse_args(words[1:])
        return
    if words[0] in LOOKING and not words[1].startswith("-"):
        assert words[1].startswith("runs/quickstart")
        words[1:2] = ["--config", "quickstart", "--ckpt_path", str(checkpoint)]
    elif "--ckpt_path" in words:
        place = words.index("--ckpt_path") + 1
        named = words[place]
        if named != "last":
            words[place] = str(checkpoint)
            assert named.startswith(parse(*words).trainer.default_root_dir + "/version_0/checkpoints/")
    parse(*words)


def test_the_readme_has_its_two_commands():
    fenced = [block.strip() for block in blocks(ROOT / "README.md", "bash")]
    assert fenced[0] == "pip install -q -c constraints.txt -e . && xpo fit --config configs/quickstart.yaml"
    assert fenced[1] == TEST_LINE


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_is_one_that_works(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command), comments=True)
    if words[0] == "xpo":
        if {"--help", "--print_config"} & set(words):
            with pytest.raises(SystemExit) as stopped:
                parse(*words[1:])
            assert stopped.value.code == 0
            assert "model" in capsys.readouterr().out
        else:
            torch.save({"state_dict": {}, "global_step": 1, "optimizer_states": []}, tmp_path / "any.ckpt")
            check_run(words[1:], tmp_path / "any.ckpt")
    elif words[:2] == ["pip", "install"]:
        check_pip(words)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert command in TEST_LINE or all(Path(word).exists() for word in words[3:] if "/" in word)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        monkeypatch.setattr(sys, "argv", words[2:])
        importlib.import_module(words[2])._arguments()
    elif words[:2] == ["python", "-m"]:
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.setattr(sys, "argv", [words[2], "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert stopped.value.code in (0, None)
        assert "usage" in capsys.readouterr().out
    elif words[0] == "python" and words[1].startswith("examples/"):
        assert Path(words[1]).is_file()  # tests/documents/test_extending.py runs it
    elif words[0] == "python" and words[1].startswith(("experiments/", "tests/", "docs/tools/")):
        monkeypatch.syspath_prepend(ROOT / Path(words[1]).parent)
        monkeypatch.setattr(sys, "argv", words[1:])
        # By its path: several folders may have a script of one name.
        name = words[1].removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, ROOT / words[1])
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        module._arguments()
    else:
        assert words[0] in {*TOOLS, "source", "python3", "bash", "git", "cd"}, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_that_a_page_names_are_there(page):
    text = page.read_text()
    modules = {name.replace(".", "/") + ".py" for name in re.findall(r"python3? -m (benchmarks(?:\.\w+)+)", text)}
    for name in modules | set(re.findall(r"\bbenchmarks/[\w/]+\.\w+", text)):
        assert (ROOT / name).is_file(), name


def test_the_readme_has_a_python_example():
    assert blocks(ROOT / "README.md", "python")


def test_the_tree_names_every_room():
    tree = (ROOT / "docs" / "design.md").read_text().split("## The tree")[1]
    package = ROOT / "xpo_lightning"
    rooms = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    rooms |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"^  (\S+)  ", tree, re.MULTILINE))
    assert named == rooms


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """Name the headings as GitHub does: small letters, without signs, a dash for each space; repeated ones numbered."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))):
        if not target.startswith("https://"):
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), target
            assert file.is_relative_to(ROOT), f"{target} is outside of the repository"
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b.c` d\n\n```\n# no heading\n```\n\n## What, really?\n## what really\n### a-b  c\n")
    assert anchors(page) == ["a-bc-d", "what-really", "what-really-1", "a-b--c"]
