"""Markdown: texts from anywhere as code blocks, lines and table cells that show them as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llamatune.errors import printable

_MARKS = re.compile(r"([\\`*_\[\]<>|#])")
_IN_CELLS = re.compile(r"[\\|`*_\[\]<>#~$&@]|:(?=//|[\w+-]+:)|(?<=[wW]{3})\.")
"""Some are marks of GitHub alone: links without brackets, mentions, formulas, emoji."""
_SPACES = re.compile(r"^ +| +$| {2,}")
# A backslash before a pipe means one thing to what splits a row, and another to what reads a cell.
_AS_ENTITIES = {"|": "&#124;", "\\": "&#92;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}

_KEPT = "\n\t"


def code_block(text: str, language: str = "") -> str:
    """``text`` as a code block, with a fence that does not occur in it; control characters are escaped."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{printable(text, _KEPT).rstrip(chr(10))}\n{fence}"


def one_line(text: str) -> str:
    """``text`` on one line, white space as single spaces; control characters are escaped."""
    return _MARKS.sub(r"\\\1", printable(" ".join(text.split())))


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], labels: int | None = None) -> str:
    """A table of texts, whose line breaks and spaces are kept; control characters are escaped.

    Columns after the first ``labels`` are aligned right; None: none is.
    """
    left = len(heading) if labels is None else labels
    lines = [" | ".join(map(one_line, heading)), "|".join("---" if n < left else "---:" for n in range(len(heading)))]
    lines += [" | ".join(map(_cell, row)) for row in rows]
    return "\n".join(f"| {line} |" if number != 1 else f"|{line}|" for number, line in enumerate(lines))


def _cell(text: str) -> str:
    return "<br>".join(_cell_line(line.replace("\t", "    ")) for line in printable(text, _KEPT).split("\n"))


def _cell_line(line: str) -> str:
    escaped = _IN_CELLS.sub(lambda mark: _AS_ENTITIES.get(mark[0], f"\\{mark[0]}"), line)
    return _SPACES.sub(lambda run: "&nbsp;" * len(run[0]), escaped)
