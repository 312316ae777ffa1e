"""The site: the page of options is that of the code, and links to files of the repository lead to pages of the site."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from test_configs import parse

import xpo_lightning
from xpo_lightning import callbacks

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference, repository = tool("reference"), tool("repository")
OPTIONS = (ROOT / "docs" / "reference.md").read_text()


# ---- the page of options ----


def test_page_is_up_to_date():
    assert reference.main(["--check"]) == 0, "run `python docs/tools/reference.py`"


def test_check_tells_an_old_page(tmp_path, monkeypatch, capsys):
    old = tmp_path / "reference.md"
    old.write_text(OPTIONS.replace("| `8` |", "| `9` |", 1))
    monkeypatch.setattr(reference, "PAGE", old)
    assert reference.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert old.read_text() == OPTIONS


def test_page_has_every_key_of_the_parser_and_no_other():
    groups = ["--model.lora.r", "4", "--model.buffer.keep", "all", "--model.reference_refresh.every", "1"]
    config = parse("fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *groups)
    parsed = {f"{group}.{key}" for group in ("model", "data") for key in config[group].as_dict()}
    inside = {f"model.{name}.{key}" for name in reference.GROUPS for key in config.model[name].as_dict()}
    on_page = set(re.findall(r"^\| `((?:model|data)\.[\w.]+)`", OPTIONS, re.MULTILINE))
    assert on_page == parsed | inside


def test_page_gives_the_parsers_defaults():
    config = parse("fit", "--model.policy.path", "p", "--model.reward", "HumanJudge", "--data.source", "s")
    rows = re.findall(r"^\| `((?:model|data)\.[\w.]+)` \| .*? \| `([^`]*)` \| ", OPTIONS, re.MULTILINE)
    absent = ("model.lora.", "model.buffer.", "model.reference_refresh.")
    given = ("model.reward", "data.source")
    compared = [(key, default) for key, default in rows if not key.startswith(absent) and key not in given]
    assert len(compared) > 60
    for key, default in compared:
        assert config[key] == yaml.safe_load(default), key


def test_page_has_a_section_for_every_class_that_a_config_can_name():
    titles = set(re.findall(r"^#### (\w+)$", OPTIONS, re.MULTILINE))
    offered = {name for name in callbacks.__all__ if name[0].isupper()}
    named = {
        name
        for text in re.findall(r"class_path: (\w+)", (ROOT / "docs" / "configuration.md").read_text())
        for name in [text]
        if name in xpo_lightning.__all__
    }
    assert offered | named <= titles


# ---- links ----


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("configuration.md", "[a](../configs/iterated.yaml)", "[a](repository/configs/iterated.yaml.md)"),
        ("configuration.md", "[a](metrics.md#x)", "[a](metrics.md#x)"),
        ("configuration.md", "[a](../README.md#licence)", "[a](index.md#licence)"),
        ("configuration.md", "[a](../benchmarks)", "[a](repository/benchmarks/README.md)"),
        ("configuration.md", "[a](https://x.org/a.md)", "[a](https://x.org/a.md)"),
        ("configuration.md", "[a](#here)", "[a](#here)"),
        ("configuration.md", "[a](nowhere.md)", "[a](nowhere.md)"),
        ("configuration.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
        ("index.md", "[a](docs/metrics.md)", "[a](metrics.md)"),
        ("repository/benchmarks/README.md", "[a](../docs/performance.md)", "[a](../../performance.md)"),
        ("repository/CONTRIBUTING.md", "[a](README.md)", "[a](../index.md)"),
    ],
)
def test_link_leads_to_a_page_of_the_site(page, link, leads_to):
    assert repository.rewritten(link, page) == leads_to


def test_site_shows_what_pages_link_to():
    shown = repository.shown()
    assert {"README.md", "CHANGELOG.md", "benchmarks/README.md", "configs/iterated.yaml"} <= set(shown)
    for file in shown:
        assert repository.file_of(repository.place_of(file)) == file
        assert repository.page_of(file).startswith("#")


def test_every_page_is_in_the_navigation_once():
    lines = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\nnot_in_nav:")[0]
    named = re.findall(r": (\S+\.md)$", lines, re.MULTILINE)
    own = [name for name in named if not name.startswith("repository/") and name not in ("index.md", "api.md")]
    assert sorted(own) == [page.name for page in PAGES]


def test_site_fetches_nothing_from_elsewhere():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert settings["strict"] is True
    assert not {"extra_javascript", "extra_css"} & settings.keys()


@pytest.mark.parametrize(
    "phrase",
    [
        "tells the completions not apart",
        "Still less of it costs time",
        "What cannot be gone on with",
        "the least that is worth a word",
        "Of a run, the reward",
        "One thing after another",
        "nonsense is asked again",
        "somebody who means ill",
    ],
)
def test_sentences_that_readers_had_to_read_twice_are_gone(phrase: str):
    for page in [ROOT / "README.md", *PAGES]:
        assert phrase not in " ".join(page.read_text().split()), page.name
