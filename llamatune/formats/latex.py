"""LaTeX: texts from anywhere as they are, and tables that need no package."""

from __future__ import annotations

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


def escape(text: str) -> str:
    """``text`` on one line; control characters, line breaks too, are shown as escapes."""
    return _escape_line(printable(text))


def _escape_line(line: str) -> str:
    escaped = _MARKS.sub(lambda mark: _AS_COMMANDS[mark[0]], line)
    return _SPACES.sub(lambda run: "~" * len(run[0]), escaped)


def _lines(text: str) -> str:
    """Several lines, within a column of a fixed width."""
    return "\\newline ".join(
        _escape_line(line.replace("\t", "    ")) or "~" for line in printable(text, "\n\t").split("\n")
    )


def table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]], labels: int, wide: bool = False) -> str:
    """A ``table`` with a caption, and a ``tabular`` with lines of the kernel alone.

    The first ``labels`` columns are aligned left, the others right. ``wide``: all have the same share of the line, and
    keep line breaks.
    """
    share = f"p{{{0.94 / max(len(heading), 1):.3f}\\linewidth}}"
    columns = share * len(heading) if wide else "l" * labels + "r" * (len(heading) - labels)
    cell = _lines if wide else escape
    body = [_row([cell(text) for text in row]) for row in rows]
    return "\n".join(
        [
            _QUOTES, "\\begin{table}[htbp]", "\\centering", f"\\caption{{{escape(title)}}}",
            f"\\begin{{tabular}}{{{columns}}}", "\\hline", _row([escape(text) for text in heading]), "\\hline",
            *body, "\\hline", "\\end{tabular}", "\\end{table}", "",
        ]
    )  # fmt: skip


def _row(cells: Sequence[str]) -> str:
    """Braces at its start, so that no cell is taken for an argument of the line break before."""
    return "{}" + " & ".join(cells) + r" \\"


def note(text: str) -> str:
    """A paragraph."""
    return f"\\noindent {escape(text)}\\par\n"
