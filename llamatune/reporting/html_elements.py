"""HTML elements whose texts are escaped: lists, sections, tables."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from html import escape

from llamatune.errors import printable
from llamatune.formats.text_table import TextTable
from llamatune.reporting.report_text import KEPT

SHORT, MANY = 24, 9
"""Lines of a table that is not divided on paper, and columns of one that is set as large there as others."""
_LONG_NAME, _WORDS = 24, 20
"""Characters of a name that is given places to break at, and of a cell among numbers that is set as text."""


class Markup(str):
    """HTML made here. Any other string is escaped when it is put into the page."""


def html(value: object) -> Markup:
    """``value`` as HTML: text escaped, ``KEPT`` kept, other control characters shown as escapes."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(printable(str(value), KEPT)))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """``<tag ...>content</tag>``; ``class_`` is the attribute ``class``, ``data_label`` is ``data-label``."""
    names = "".join(f' {name.strip("_").replace("_", "-")}="{escape(x)}"' for name, x in attributes.items())
    return Markup(f"<{tag}{names}>{''.join(map(html, content))}</{tag}>")


def breakable(name: str) -> Markup:
    """A long name that breaks behind a comma, ``=`` or slash, and within a long part of it behind ``_``."""
    if len(name) <= _LONG_NAME:
        return html(name)
    parts = list[Markup]()
    for part in re.split(r"(?<=[,=/])(?=.)", name):
        if len(part) > _LONG_NAME:
            parts += map(html, re.split(r"(?<=_)(?=.)", part))
        else:  # a browser would break 5e-4 behind its hyphen
            parts.append(element("span", part, class_="unbroken") if "-" in part else html(part))
    return Markup("<wbr>".join(parts))


def unordered(items: Iterable[object], **attributes: str) -> Markup:
    """An unordered list; nothing without items."""
    entries = [element("li", item) for item in items]
    return element("ul", *entries, **attributes) if entries else Markup()


def header(headings: Sequence[str], labels: int = 0, words: Container[int] = ()) -> Markup:
    """The head of a table, whose first ``labels`` columns name the line; ``words`` are columns of text."""
    cells = []
    for place, heading in enumerate(headings):
        kind = "label" if place < labels else "words" if place in words else "name" if len(heading) > _LONG_NAME else ""
        cells.append(element("th", breakable(heading), scope="col", **({"class_": kind} if kind else {})))
    return element("thead", element("tr", *cells))


def table(made: TextTable) -> Markup:
    """A table of numbers, or of texts; it scrolls sideways on a narrow screen. Nothing without rows."""
    if not made.rows:
        return Markup()
    words = set() if made.wide else _columns_of_words(made)
    body = []
    for row in made.rows:
        labels = (element("th", text, scope="row") for text in row[: made.labels])
        cells = (
            element("td", text, class_="words") if place in words else element("td", text)
            for place, text in enumerate(row[made.labels :], made.labels)
        )
        body.append(element("tr", *labels, *cells))
    head = header(made.header, made.labels, words)
    parts = element("caption", breakable(made.title)), head, element("tbody", *body)
    kind = "texts" if made.wide else "numbers many" if len(made.header) > MANY else "numbers"
    whole = element("table", *parts, class_=kind)
    # On paper a table that fits is not divided, and narrow ones stand side by side.
    short = " short" if len(made.rows) <= SHORT else ""
    shown = element("div", whole, class_=f"scroll{short}", tabindex="0")
    return element("div", shown, unordered(made.notes, class_="quiet notes")) if made.notes else shown


def _columns_of_words(made: TextTable) -> set[int]:
    """The places of columns that hold sentences or lists among columns of numbers."""
    places = range(made.labels, len(made.header))
    return {place for place in places if any(len(row[place]) > _WORDS for row in made.rows)}


def section(title: str, *content: Markup, **attributes: str) -> Markup:
    """A section with a heading; nothing without content."""
    filled = [part for part in content if part]
    return element("section", element("h2", title), *filled, **attributes) if filled else Markup()
