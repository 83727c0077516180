"""Texts from anywhere in Markdown: read by another program, they are what they were."""

from __future__ import annotations

import random
from html import unescape
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from llamatune.errors import printable
from llamatune.formats.markdown import code_block, table

NASTY = [
    "", " ", "  two before,  two between, two after  ", "a | b", r"a \| b", "\\", "\\\\|", "|", "||\n||",
    "`code`", "``` \n```", "~~~\nx\n~~~", "**bold** _it_ ~~gone~~", "# heading\n- list\n1. one\n> quote\n---\n===",
    "<b>x</b><script>alert(1)</script>", "<!-- hidden -->", "&amp; &lt; &#124; &nbsp;", "[link](http://a.b) ![i](x)",
    "https://a.b www.a.b WWW.a.b a@b.c :smile: @me #1", "$x^2$ $$y$$", "line\nline\n\nline\n", "\ttab",
    "\x1b[31mred\x1b[0m \x00 \x07 \r\n", "\u202eright to left", "a\u2028b\x85c", "10 * 3 = 30 * 1",
    "| a | b |\n|---|---|\n| c | d |", "</td></tr></table>", "<br>", "Straße 数 🦙", "{{ x }} {% y %}",
]  # fmt: skip


class _Cells(HTMLParser):
    """The text of each cell, line breaks as they are, and every other tag that was met."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cells, self.tags, self._inside = list[str](), set[str](), False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True
        elif tag == "br":
            self.cells[-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


def _read(page: str) -> _Cells:
    cells = _Cells()
    cells.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page))
    return cells


def _expected(text: str) -> str:
    return printable(text, "\n\t").replace("\t", "    ")


def test_cells_show_texts_as_they_are() -> None:
    rows = [[text, "middle", text] for text in NASTY]
    page = table(["base", "a|b", "tuned"], rows)
    assert page.count("\n") == len(rows) + 1
    found = _read(page)
    assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert found.cells[:3] == ["base", "a|b", "tuned"]
    assert [text.replace("\xa0", " ") for text in found.cells[3:]] == [_expected(text) for row in rows for text in row]


@pytest.mark.parametrize("seed", range(4))
def test_cells_of_random_marks(seed: int) -> None:
    chance = random.Random(seed)
    alphabet = [*"\\|`*_[]()<>!#~$&:@^=+-.wW/ \n1a{}\"'", "\u200d", "\x1b"]
    texts = ["".join(chance.choices(alphabet, k=chance.randrange(1, 30))) for _ in range(300)]
    found = _read(table(["text"], [[text] for text in texts]))
    assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert [text.replace("\xa0", " ") for text in found.cells[1:]] == list(map(_expected, texts))


@pytest.mark.parametrize("text", NASTY)
def test_a_code_block_ends_where_it_should(text: str) -> None:
    page = MarkdownIt("commonmark").render(f"before\n\n{code_block(text, 'text')}\n\nafter")
    begin, end = '<p>before</p>\n<pre><code class="language-text">', "</code></pre>\n<p>after</p>\n"
    assert page.startswith(begin)
    assert page.endswith(end)
    assert unescape(page[len(begin) : -len(end)]).rstrip("\n") == printable(text, "\n\t").rstrip("\n")
