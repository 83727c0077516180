"""Texts from anywhere in LaTeX: read back by its rules they are what they were; nothing in them is a command."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llamatune.errors import printable
from llamatune.formats.latex import escape, table
from llamatune.formats.text_table import TextTable

NASTY = [
    r"\input{/etc/passwd}", r"\end{tabular}\write18{rm x}", "100 % & more # $x^2$ _a_ {b} ~c", "\\\\", "[2cm] * x",
    "a -- b --- c - d", "<b>`x' \"q\"</b> | y", "  two  spaces ", "\x1b[31m\x00\u202e", "\\newcommand\\a{}", "^^41",
]  # fmt: skip
_BACK = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textasciigrave{}": "`", r"\textquotesingle{}": "'",
    r"\textquotedbl{}": '"', "-{}": "-", "~": " ", **{f"\\{mark}": mark for mark in "{}$&#_%"},
}  # fmt: skip
_TOKEN = re.compile("|".join(map(re.escape, sorted(_BACK, key=len, reverse=True))))


@pytest.mark.parametrize("text", NASTY)
def test_an_escaped_text_reads_back_and_holds_nothing_else(text: str) -> None:
    escaped = escape(text)
    assert _TOKEN.sub(lambda found: _BACK[found[0]], escaped) == printable(text)
    assert not re.search(r"[\\{}$&#_%^~<>|`'\"]|--", _TOKEN.sub("", escaped))


def test_a_table_has_a_line_a_row_and_a_column_a_cell() -> None:
    made = table("A & B", ["", "x"], [[text, text] for text in NASTY], 1)
    lines = [line for line in made.splitlines() if line.endswith(r" \\")]
    assert len(lines) == len(NASTY) + 1
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 and line.startswith("{}") for line in lines)
    assert r"\begin{tabular}{lr}" in made
    assert r"\caption{A \& B}" in made


def test_what_is_too_wide_is_set_smaller_and_texts_share_the_line() -> None:
    def commands(columns: int, text: str, wide: bool = False) -> str:
        return table("x", [text] * columns, [], 1, wide)

    assert "\\small" not in commands(3, "1.0")
    sizes = [next(i for i, name in enumerate(("small", "footnote", "script")) if f"\\{name}" in commands(n, "1234.56"))
             for n in (9, 10, 12)]  # fmt: skip
    assert sizes == sorted(sizes)
    assert "\\scriptsize" in commands(14, "tokens/s")
    made = table("x", ["a", "b"], [["short", "long" * 60]], 1, wide=True, notes=["50 %"])
    shares = [float(share) for share in re.findall(r"dimexpr ([\d.]+)", made)]
    assert sum(shares) == pytest.approx(1, abs=0.002)
    assert shares[1] > 2 * shares[0]
    assert made.index("50 \\%") < made.index("\\end{table}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the path")
def test_latex_sets_it(tmp_path: Path) -> None:
    rows = tuple((text, f"{text}\nline\n\n* line") for text in NASTY)
    tables = [TextTable("Nasty", ("x", "y"), rows, wide=wide, notes=tuple(NASTY), name="a") for wide in (False, True)]
    body = "\n".join(made.latex() for made in tables)
    page = f"\\documentclass{{article}}\\usepackage[T1]{{fontenc}}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    words = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
