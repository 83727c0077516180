"""Pages of the documentation: names, titles, text and their index, from the installed package or a checkout."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from llamatune.errors import EnvironmentFault, SpecError

_INDEX = "README"
_HEADING = re.compile(r"^## (.+)$|^- \[([\w-]+)\]\([\w-]+\.md\): (.+)$", re.MULTILINE)


def pages() -> dict[str, Path]:
    """The Markdown file of each page by its name; the index is none of them.

    Raises:
        EnvironmentFault: this installation has none.
    """
    return {name: path for name, path in _files().items() if name != _INDEX}


def index() -> dict[str, dict[str, str]]:
    """What each page holds, by its name, under the headings of the index and in its order.

    Raises:
        EnvironmentFault: this installation has no pages.
    """
    text = _files()[_INDEX].read_text(encoding="utf-8")
    sections: dict[str, dict[str, str]] = {}
    for heading, name, content in _HEADING.findall(text):
        if heading:
            section = sections.setdefault(heading, {})
        else:
            section[name] = content
    return sections


def _files() -> dict[str, Path]:
    package = Path(__file__).parent
    for place in (package / "docs", package.parent / "docs"):
        if found := {path.stem: path for path in sorted(place.glob("*.md"))}:
            return found
    raise EnvironmentFault("this installation lacks the documentation", package, "install the wheel again")


def title(page: Path) -> str:
    """Its first heading."""
    with page.open(encoding="utf-8") as lines:
        return next(line for line in lines if line.startswith("# ")).removeprefix("# ").strip()


def find_page(name: str) -> Path:
    """The page of that name; ``SpecError`` names those that are like it."""
    known = pages()
    stem = name.removesuffix(".md").removeprefix("docs/")
    if stem not in known:
        near = difflib.get_close_matches(stem, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "llamatune docs lists them"
        raise SpecError(f"no page called {name!r}", "docs", hint)
    return known[stem]
