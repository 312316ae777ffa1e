"""Check that a tag may be released: every place that states the version or the address agrees with it."""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDER = r"OWNER(/|\.github\.io/)xpo-lightning"
"""Stands for the repository's address, and for the site's, until they are known."""


def main(argv: list[str] | None = None) -> int:
    """Print what is wrong; return 1 if anything is."""
    found = list(problems(ROOT, _arguments(argv).tag))
    for problem in found:
        print(f"check_release: {problem}", file=sys.stderr)
    return min(1, len(found))


def problems(root: Path, tag: str) -> Iterator[str]:
    """Name each place that does not agree with the tag, and each file that still has the address's placeholder."""
    if re.fullmatch(r"v\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", tag) is None:
        yield f"the tag {tag!r} is no version with a v before it, such as v0.1.0"
        return
    version = tag[1:]
    for place, stated in versions(root).items():
        if stated != version:
            yield f"{place} states {stated}, the tag {version}"
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if re.search(heading, (root / "CHANGELOG.md").read_text(), re.MULTILINE) is None:
        yield f"CHANGELOG.md has no section '## [{version}] - DATE'"
    for file in files_with_placeholder(root):
        yield f"{file} has the placeholder OWNER where the repository's address belongs"


def versions(root: Path) -> dict[str, str]:
    """Read the version that each file states."""
    package = (root / "xpo_lightning" / "__init__.py").read_text()
    citation = (root / "CITATION.cff").read_text()
    return {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "xpo_lightning/__init__.py": re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)[0],
        "CITATION.cff": re.findall(r"^version: (\S+)$", citation, re.MULTILINE)[0],
    }


def files_with_placeholder(root: Path) -> list[str]:
    """List the tracked files that contain the placeholder; RELEASE.md and tests explain it and do not count."""
    command = ["git", "grep", "-lE", PLACEHOLDER, "--", ".", ":!RELEASE.md", ":!tests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.split()


def _arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="the tag, such as v0.1.0")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
