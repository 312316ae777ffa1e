"""A hook of mkdocs: the site has the README as its first page, and the files of the repository that pages link to.

Pages are written for a reader of the repository, so their links lead from file to file. Here each link to a file
outside of docs/ becomes one to a page that shows the file.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
ALWAYS = (HOME, "CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md")
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".ipynb": "json", ".toml": "toml", ".txt": "text", ".jsonl": "json"}
PLACES = {HOME: "index.md"}
API = """# API

What `xpo_lightning` exports. The options of each class are also in [Options](reference.md), as a config has them.

::: xpo_lightning
    options:
      show_root_toc_entry: false
      members_order: alphabetical
      heading_level: 2

## Callbacks

::: xpo_lightning.callbacks
    options:
      show_root_toc_entry: false
      heading_level: 3
"""


def place_of(file: str) -> str:
    """Name the page of a file of the repository: `docs/x.md` is at `x.md`, any other under `repository/`."""
    if file in PLACES:
        return PLACES[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return f"repository/{file}" if file.endswith(".md") else f"repository/{file}.md"


def file_of(page: str) -> str:
    """Name the file that a page shows; the opposite of `place_of`."""
    for file, place in PLACES.items():
        if page == place:
            return file
    if not page.startswith("repository/"):
        return f"docs/{page}"
    file = page.removeprefix("repository/")
    return file if (ROOT / file).is_file() else file.removesuffix(".md")


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Change what is not in a fenced block of code."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def linked(file: str, target: str) -> str | None:
    """Name the file of the repository that a link leads to; None where it leads elsewhere, or nowhere."""
    if "://" in target or target.startswith("mailto:"):
        return None
    found = os.path.normpath(PurePosixPath(file).parent / target)
    if (ROOT / found).is_dir() and (ROOT / found / "README.md").is_file():
        found = f"{found}/README.md"
    return found if (ROOT / found).is_file() else None


def links(file: str) -> Iterator[str]:
    """Give the files of the repository that a file links to."""
    found: list[str] = []
    outside_fences((ROOT / file).read_text(), lambda text: found.extend(LINK.findall(text)) or text)
    yield from filter(None, (linked(file, target) for target in found))


def shown() -> list[str]:
    """Name the files outside of docs/ that the site shows."""
    docs = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
    queue, seen = [*ALWAYS, *docs], set[str]()
    while queue:
        file = queue.pop()
        if file not in seen:
            seen.add(file)
            queue += links(file) if file.endswith(".md") else []
    return sorted(file for file in seen if not file.startswith("docs/"))


def page_of(file: str) -> str:
    """Write the page of a file."""
    text = (ROOT / file).read_text()
    if file.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(file).suffix, "text")
    return f"# {file}\n\n````{language}\n{text}````\n"


def rewritten(text: str, page: str) -> str:
    """Let the links of a page lead to pages."""
    file, folder = file_of(page), str(PurePosixPath(page).parent)

    def lead(match: re.Match[str]) -> str:
        found = linked(file, match[1])
        return match[1] if found is None else PurePosixPath(os.path.relpath(place_of(found), folder)).as_posix()

    return outside_fences(text, lambda part: LINK.sub(lead, part))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File  # noqa: PLC0415  (the rest of this file works without mkdocs)

    for file in shown():
        files.append(File.generated(config, place_of(file), content=page_of(file)))
    files.append(File.generated(config, "api.md", content=API))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    return rewritten(markdown, page.file.src_uri)
