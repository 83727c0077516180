"""Pages of the documentation: names, titles and text, from the installed package or a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

from llamatune.errors import EnvironmentFault, SpecError


def pages() -> dict[str, Path]:
    """The Markdown file of each page by its name.

    Raises:
        EnvironmentFault: this installation has none.
    """
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
