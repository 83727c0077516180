"""HTML elements whose texts are escaped: lists, sections, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from llamatune.errors import printable
from llamatune.formats.text_table import TextTable

SHORT, MANY = 24, 9
"""Lines of a table that is not divided on paper, and columns of one that is set as large there as others."""


class Markup(str):
    """HTML made here. Any other string is escaped when it is put into the page."""


def html(value: object) -> Markup:
    """``value`` as HTML: text escaped, line breaks and tabs kept, other control characters shown as escapes."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(printable(str(value), keeps="\n\t")))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """``<tag ...>content</tag>``; ``class_`` is the attribute ``class``, ``data_label`` is ``data-label``."""
    names = "".join(f' {name.strip("_").replace("_", "-")}="{escape(x)}"' for name, x in attributes.items())
    return Markup(f"<{tag}{names}>{''.join(map(html, content))}</{tag}>")


def unordered(items: Iterable[object], **attributes: str) -> Markup:
    """An unordered list; nothing without items."""
    entries = [element("li", item) for item in items]
    return element("ul", *entries, **attributes) if entries else Markup()


def header(headings: Sequence[str], labels: int = 0) -> Markup:
    """The head of a table, whose first ``labels`` columns name the line."""
    cells = [
        element("th", heading, scope="col", class_="label") if place < labels else element("th", heading, scope="col")
        for place, heading in enumerate(headings)
    ]
    return element("thead", element("tr", *cells))


def table(made: TextTable) -> Markup:
    """A table of numbers, or of texts; it scrolls sideways on a narrow screen. Nothing without rows."""
    if not made.rows:
        return Markup()
    body = []
    for row in made.rows:
        labels = (element("th", text, scope="row") for text in row[: made.labels])
        body.append(element("tr", *labels, *(element("td", text) for text in row[made.labels :])))
    parts = element("caption", made.title), header(made.header, made.labels), element("tbody", *body)
    kind = "texts" if made.wide else "numbers many" if len(made.header) > MANY else "numbers"
    whole = element("table", *parts, class_=kind)
    # On paper a table that fits is not divided, and narrow ones stand side by side.
    short = " short" if len(made.rows) <= SHORT else ""
    shown = element("div", whole, class_=f"scroll{short}", tabindex="0")
    return element("div", shown, unordered(made.notes, class_="quiet notes")) if made.notes else shown


def section(title: str, *content: Markup, **attributes: str) -> Markup:
    """A section with a heading; nothing without content."""
    filled = [part for part in content if part]
    return element("section", element("h2", title), *filled, **attributes) if filled else Markup()
