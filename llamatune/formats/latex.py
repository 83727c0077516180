"""LaTeX: texts from anywhere as they are, and tables that need no package."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from llamatune.errors import printable

_AS_COMMANDS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}", "-": "-{}", **{mark: f"\\{mark}" for mark in "{}$&#_%"},
}  # fmt: skip
_MARKS = re.compile(r"-(?=-)|[\\~^<>|`'\"{}$&#_%]")
"""Two hyphens would become a dash."""
_SPACES = re.compile(r"^ +| {2,}")
_QUOTES = "% Straight quotes need \\usepackage[T1]{fontenc}; letters beyond Latin's need XeLaTeX or LuaLaTeX."

_LINE_POINTS = 375.0
"""A line of ``article``, and 15 points on each side."""
_SIZES = (
    (4.5, 6.0, ""),
    (4.15, 5.0, r"\small\setlength{\tabcolsep}{5pt}"),
    (3.8, 4.0, r"\footnotesize\setlength{\tabcolsep}{4pt}"),
    (3.55, 2.5, r"\scriptsize\setlength{\tabcolsep}{2.5pt}"),
)
"""Mean width of letters and digits, space beside a column, both in points, and the commands for them."""
_LEAST_ROOT = 5.5


def escape(text: str) -> str:
    """``text`` on one line; control characters, line breaks too, are shown as escapes."""
    return _escape_line(printable(text))


def _escape_line(line: str) -> str:
    escaped = _MARKS.sub(lambda mark: _AS_COMMANDS[mark[0]], line)
    return _SPACES.sub(lambda run: "~" * len(run[0]), escaped)


def _lines(text: str) -> str:
    """Several lines, within a column of a fixed width; a path may be broken behind each slash."""
    lines = printable(text, "\n\t").replace("\t", "    ").split("\n")
    return "\\newline ".join(_escape_line(line).replace("/", "/\\allowbreak{}") or "~" for line in lines)


def table(
    title: str, heading: Sequence[str], rows: Sequence[Sequence[str]], labels: int, wide: bool = False,
    notes: Sequence[str] = (),
) -> str:  # fmt: skip
    """A ``table`` with a caption, a ``tabular`` with lines of the kernel alone, and ``notes`` below it.

    The first ``labels`` columns are aligned left, the others right. ``wide``: they share the line by the lengths of
    their texts, and keep line breaks. Others that are too wide for it are set in smaller letters, and stand out evenly
    on both sides if they still are.
    """
    columns, size, row = "l" * labels + "r" * (len(heading) - labels), _size([heading, *rows]), _row
    if wide:
        columns, size, row = _shares([heading, *rows]), "\\small" if len(heading) < 4 else "\\footnotesize", _wide_row
    below = [f"{escape(note)}\\par" for note in notes]
    if below:
        below = ["\\par\\medskip", "\\begin{minipage}{\\linewidth}\\footnotesize", *below, "\\end{minipage}"]
    return "\n".join(
        [
            _QUOTES, "\\begin{table}[htbp]", "\\centering", f"\\caption{{{escape(title)}}}", *filter(None, [size]),
            f"\\makebox[\\linewidth]{{\\begin{{tabular}}{{{columns}}}", "\\hline", _row(heading), "\\hline",
            *map(row, rows), "\\hline", "\\end{tabular}}", *below, "\\end{table}", "",
        ]
    )  # fmt: skip


def _shares(rows: Sequence[Sequence[str]]) -> str:
    """Columns that share the line by the roots of their longest texts: lines in a cell shorten as others lengthen."""
    roots = [max(_LEAST_ROOT, math.sqrt(max(map(len, column)))) for column in zip(*rows, strict=True)]
    return "".join(f"p{{\\dimexpr {root / sum(roots):.3f}\\linewidth-2\\tabcolsep\\relax}}" for root in roots)


def _size(rows: Sequence[Sequence[str]]) -> str:
    """The largest letters in which columns of texts fit the line of ``article``; empty: those of the page."""
    characters = sum(max(map(len, column)) for column in zip(*rows, strict=True))
    fitting = (
        command for points, space, command in _SIZES
        if characters * points + 2 * len(rows[0]) * space <= _LINE_POINTS
    )  # fmt: skip
    return next(fitting, _SIZES[-1][-1])


def _row(cells: Sequence[str]) -> str:
    """Braces at its start, so that no cell is taken for an argument of the line break before."""
    return "{}" + " & ".join(map(escape, cells)) + r" \\"


def _wide_row(cells: Sequence[str]) -> str:
    """Ragged at the right, where a line break has another command."""
    return "{}" + " & ".join(f"\\raggedright {_lines(cell)}" for cell in cells) + r" \tabularnewline"
