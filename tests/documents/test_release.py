"""What a public repository has: each command of a workflow is one that works, and all agrees with the package."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_docs import repository
from test_readme import TEST_LINE, anchors, check_pip, prose

import xpo_lightning

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [ROOT / name for name in ("RELEASE.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "llms.txt")]
# What GitHub runs on a pull request, and what this computer runs in a blink; the others are only looked at.
DEPLOYS = ("mike", "git")


def load(path: Path) -> dict[str, Any]:
    loaded = yaml.load(path.read_text(), yaml.BaseLoader)  # noqa: S506  (strings alone: `on` would be True)
    assert isinstance(loaded, dict)
    return loaded


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def commands() -> list[str]:
    texts = [step["run"] for path in WORKFLOWS for step in steps(load(path)) if "run" in step]
    return sorted({line.strip() for text in texts for line in text.splitlines()})


def check_release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_release", ROOT / "tools" / "check_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", commands())
def test_command_of_a_workflow_is_one_that_works(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command))
    if words[:3] == ["pip", "install", "torch==2.13.0"]:
        assert words[3:] == ["--index-url", "https://download.pytorch.org/whl/cpu"]
        assert words[2] in (ROOT / "constraints.txt").read_text().split()
    elif words[:2] == ["pip", "install"]:
        check_pip(words)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert command in TEST_LINE
    elif words[:2] == ["python", "tools/check_release.py"]:
        assert check_release()._arguments(["v0.1.0"]).tag == "v0.1.0"
    elif words[:3] == ["python", "-m", "build"]:
        assert "build" in " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    elif words[0] == "bash":
        assert subprocess.run(["bash", "-n", *words[1:]], check=False).returncode == 0
    elif words[0] == "nox":
        tool = Path(sys.executable).with_name("nox")
        listed = subprocess.run([tool, "--list", *words[1:]], capture_output=True, text=True, check=True, cwd=ROOT)
        assert "\n* " in listed.stdout
    elif words[0] == "mkdocs":
        assert '"mkdocs"' in (ROOT / "noxfile.py").read_text()
    else:
        assert words[0] in DEPLOYS, command
        assert words[0] != "mike" or "mike" in yaml.safe_load(settings())["extra"]["version"]["provider"]


def settings() -> str:
    return (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_whole(path: Path):
    """Each has a trigger, the least rights, a time limit a job, and steps that use an action or run a command."""
    workflow = load(path)
    assert workflow["name"] == path.stem
    assert workflow["on"]
    assert workflow["permissions"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"].isdigit(), name
        assert job.get("needs", name) in workflow["jobs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"]), step


def test_no_command_pastes_what_an_outsider_can_write():
    """A title, a branch or a tag inside `run` would be code; names of branches and tags come by the environment."""
    for command in commands():
        assert "${{" not in command


def test_pythons_of_the_matrix_are_those_that_the_package_admits_and_states():
    (job,) = (job for job in load(GITHUB / "workflows" / "tests.yml")["jobs"].values() if "strategy" in job)
    tried = job["strategy"]["matrix"]["python"]
    assert tried == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={tried[0]}"
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    known_to_work = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    (may_fail,) = re.findall(r"matrix.python == '([\d.]+)'", job["continue-on-error"])
    assert known_to_work == [version for version in tried if version != may_fail]
    support = (ROOT / "docs" / "support.md").read_text()
    for version in tried:
        assert re.search(rf"^\| Python {re.escape(version)} \| (not tried)?", support, re.MULTILINE)[1] == (
            "not tried" if version == may_fail else None
        )


def test_only_the_job_that_publishes_may_ask_for_a_token():
    workflow = load(GITHUB / "workflows" / "publish.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    assert workflow["permissions"] == {"contents": "read"}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "password" not in str(workflow)
    assert "secrets" not in str(workflow)
    assert any("check_release" in step.get("run", "") for step in build["steps"])


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[bf]*.yml")), ids=lambda path: path.stem)
def test_issue_form_has_what_github_asks_for(path: Path):
    form = load(path)
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("label" if part["type"] != "markdown" else "value")


def test_dependabot_watches_pins_and_actions():
    updates = load(GITHUB / "dependabot.yml")["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "github-actions"}
    assert all((ROOT / one["directory"].strip("/")).is_dir() for one in updates)


# ---- versions and addresses ----


def test_citation_names_the_version_the_licence_and_the_paper():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["project"]["version"] == xpo_lightning.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2405.21046"
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Xie"


def test_address_is_the_same_everywhere():
    urls = PROJECT["project"]["urls"]
    repository_url = urls["Repository"]
    assert all(url.startswith((repository_url, "https://OWNER.github.io/")) for url in urls.values())
    files = [*ROOT.glob("*.md"), *GITHUB.rglob("*.yml"), *(ROOT / "docs").glob("*.md"), ROOT / "CITATION.cff"]
    files.append(ROOT / "examples" / "quickstart.ipynb")
    text = "\n".join(file.read_text() for file in files)
    named = set(re.findall(r"github\.com/([\w-]+/xpo-lightning)", text))
    assert named == {repository_url.removeprefix("https://github.com/")}


def release(folder: Path, version: str = "0.2.0", address: str = "me/xpo-lightning") -> Path:
    (folder / "xpo_lightning").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (folder / "xpo_lightning" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (folder / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (folder / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.2.0] - 2027-01-02\n")
    (folder / "README.md").write_text(f"git clone https://github.com/{address}\n")
    git = shutil.which("git")
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run([git, *words], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("tag", "changes", "said"),
    [
        ("v0.2.0", {}, []),
        ("0.2.0", {}, ["the tag '0.2.0' is no version with a v before it, such as v0.1.0"]),
        ("v0.2.0", {"version": "0.1.9"}, ["pyproject.toml states 0.1.9, the tag 0.2.0"]),
        (
            "v0.2.0",
            {"address": "OWNER/xpo-lightning"},
            ["README.md has the placeholder OWNER where the repository's address belongs"],
        ),
    ],
)
def test_a_tag_that_may_not_be_released_is_refused(tmp_path: Path, tag: str, changes: dict[str, str], said: list[str]):
    assert list(check_release().problems(release(tmp_path / "it", **changes), tag)) == said


def test_a_tag_of_another_version_is_refused_at_every_place(tmp_path: Path):
    found = list(check_release().problems(release(tmp_path / "it"), "v0.3.0"))
    assert len(found) == 4, "three versions, and no section of the changelog"


def test_changelog_has_a_section_for_this_version():
    found = check_release().problems(ROOT, f"v{xpo_lightning.__version__}")
    assert [problem for problem in found if "placeholder" not in problem] == []


# ---- pages ----


@pytest.mark.parametrize("page", [*PAGES, GITHUB / "PULL_REQUEST_TEMPLATE.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))):
        if not target.startswith("https://"):
            file = (page.parent / target).resolve()
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_llms_txt_names_every_page_in_the_order_of_the_site():
    text = (ROOT / "llms.txt").read_text()
    assert re.match(r"# xpo-lightning\n\n> ", text), "a title and a summary come first"
    named = re.findall(r"\]\(docs/([\w]+\.md)\)", text)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    nav = re.findall(r": (\w+\.md)$", settings().split("\nnav:\n")[1], re.MULTILINE)
    assert named == [name for name in nav if name not in ("index.md", "api.md")]
    assert {"RELEASE.md", "SECURITY.md"} <= set(repository.shown())


def test_sections_of_the_site_are_in_the_order_of_use():
    nav = settings().split("\nnav:\n")[1].split("\nextra:")[0]
    sections = re.findall(r"^  - ([\w ]+):$", nav, re.MULTILINE)
    assert sections == ["Set up", "How to", "Reference", "Evidence", "Project"]


def test_sdist_has_what_this_repository_has():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ("/.github", "/CITATION.cff", "/CODE_OF_CONDUCT.md", "/RELEASE.md", "/SECURITY.md", "/llms.txt"):
        assert name in included
        assert (ROOT / name.strip("/")).exists()


def test_pages_in_the_root_have_only_commands_that_work():
    fenced = re.findall(r"^ *```bash\n(.*?)^ *```", (ROOT / "RELEASE.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in fenced for line in block.splitlines()]
    assert lines == ["bash .ci/run", f"python tools/check_release.py v{xpo_lightning.__version__}"]
    for option, value in pairwise(lines[0].split()):
        assert option != "bash" or (ROOT / value).is_file()
