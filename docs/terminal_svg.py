"""A terminal's screen after what was written to it, and screens in time as one animated SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from operator import itemgetter

_TOKEN = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|[\s\S]")
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_CELL, _LINE, _MARGIN = 8.4, 18, 14  # pixels: a column, a row, around the screen
_LEVELS = "▁▂▃▄▅▆▇█"
# The ends that a line in the character has: left, right, up, down.
_ENDS = {
    "─": "lr", "━": "lr", "╸": "l", "╺": "r", "│": "ud", "┃": "ud", "╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu",
    "┌": "rd", "┐": "ld", "└": "ru", "┘": "lu", "├": "rud", "┤": "lud", "┬": "lrd", "┴": "lru", "┼": "lrud",
    "┏": "rd", "┓": "ld", "┳": "lrd", "┡": "ru", "┩": "lu", "╇": "lru",
}  # fmt: skip
_HEAVY = set("━╸╺┃┏┓┳┡┩╇")
_LIGHT_BELOW = str.maketrans("┡┩╇", "╷╷╷")
_ENDS["╷"] = "d"
_STYLE = """
.card{fill:#fff;stroke:#d0d7de}.t{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
fill:#1f2328;white-space:pre}.l{stroke:#1f2328;fill:none}.heavy{stroke-width:2.4}.v{fill:#1f2328}
.bold{font-weight:700}.dim{opacity:.62}
.t.red,.v.red{fill:#b3261e}.t.green,.v.green{fill:#116329}.t.yellow,.v.yellow{fill:#7d4e00}.t.blue,.v.blue{fill:#0550ae}
.t.magenta,.v.magenta{fill:#8a2a86}.t.cyan,.v.cyan{fill:#0a6b78}.l.red{stroke:#b3261e}.l.green{stroke:#116329}
.l.cyan{stroke:#0a6b78}.l.magenta{stroke:#8a2a86}.l.black{stroke:#d0d7de}
@media(prefers-color-scheme:dark){.card{fill:#0d1117;stroke:#3d444d}.t,.v{fill:#e6edf3}.l{stroke:#e6edf3}
.t.red,.v.red{fill:#ff8e85}.t.green,.v.green{fill:#5bd17a}.t.yellow,.v.yellow{fill:#e3b341}.t.blue,.v.blue{fill:#79c0ff}
.t.magenta,.v.magenta{fill:#e19ce0}.t.cyan,.v.cyan{fill:#56d4dd}.l.red{stroke:#ff8e85}.l.green{stroke:#5bd17a}
.l.cyan{stroke:#56d4dd}.l.magenta{stroke:#e19ce0}.l.black{stroke:#3d444d}}
"""


@dataclass(frozen=True)
class Style:
    """How a character is drawn; ``colour`` is empty for that of plain text."""

    colour: str = ""
    bold: bool = False
    dim: bool = False

    @property
    def classes(self) -> str:
        return "".join(f" {name}" for name in (self.colour, "bold" * self.bold, "dim" * self.dim) if name)


Row = tuple[tuple[str, Style], ...]
"""The characters of a row up to the last that is no space."""


class Screen:
    """A terminal of so many columns and rows, and 16 colours.

    It knows what rich writes: a cursor that goes up, erased lines and styles. After a character in the last column the
    cursor stays there until the next one, which begins a new row.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self._columns, self._height = columns, rows
        self._rows: list[list[tuple[str, Style]]] = [[] for _ in range(rows)]
        self._x = self._y = 0
        self._style = Style()

    def write(self, text: str) -> None:
        """
        Raises:
            ValueError: a control that is none of those.
        """
        for token in _TOKEN.findall(text):
            if token.startswith("\x1b["):
                self._control(token)
            elif token == "\r":
                self._x = 0
            elif token == "\n":
                self._go_down()
            elif token.isprintable():
                self._put(token)
            else:
                raise ValueError(f"a control that is not known: {token!r}")

    def rows(self) -> tuple[Row, ...]:
        """Every row, as a screen shows it."""
        shown = []
        for row in self._rows:
            length = max((place + 1 for place, (character, _) in enumerate(row) if character != " "), default=0)
            shown.append(tuple(row[:length]))
        return tuple(shown)

    def _control(self, token: str) -> None:
        kind, numbers = token[-1], [int(number) for number in re.findall(r"\d+", token)]
        if kind == "A":
            self._y = max(0, self._y - (numbers or [1])[0])
        elif kind == "K" and numbers == [2]:
            self._rows[self._y] = []
        elif kind == "m":
            for number in numbers or [0]:
                self._style = _styled(self._style, number)
        elif kind not in "hl":  # the cursor is not drawn
            raise ValueError(f"a control that is not known: {token!r}")

    def _put(self, character: str) -> None:
        if self._x == self._columns:
            self._go_down()
            self._x = 0
        row = self._rows[self._y]
        row += [(" ", Style())] * (self._x + 1 - len(row))
        row[self._x] = (character, self._style)
        self._x += 1

    def _go_down(self) -> None:
        if self._y + 1 == self._height:
            self._rows = [*self._rows[1:], []]
        else:
            self._y += 1


def _styled(style: Style, number: int) -> Style:
    if number == 0:
        return Style()
    if number in (1, 2):
        return replace(style, bold=style.bold or number == 1, dim=style.dim or number == 2)
    if number == 22:
        return replace(style, bold=False, dim=False)
    if number in (3, 4, 23, 24):  # italics and underlines are drawn plain
        return style
    if number in (39, 37, 97):
        return replace(style, colour="")
    if 30 <= number % 60 <= 36:
        return replace(style, colour=_COLOURS[number % 60 - 30])
    raise ValueError(f"a style that is not known: {number}")


def _row_svg(row: Row) -> str:
    """A row at the top of the picture: texts, each as wide as its columns, and lines and blocks as shapes."""
    parts, place = [], 0

    def kind(cell: tuple[str, Style]) -> tuple[str, Style]:
        character, style = cell
        shape = "l" if character in _ENDS else "v" if character in _LEVELS else "t"
        return shape + " heavy" * (character in _HEAVY), style

    for (shape, style), cells in groupby(row, kind):
        text = "".join(character for character, _ in cells)
        if shape == "t":
            # Words apart by several spaces are placed each, so that columns stand whatever the font.
            for word in re.finditer(r"\S+(?: \S+)*", text):
                x, width = (place + word.start()) * _CELL, len(word[0]) * _CELL
                parts.append(
                    f'<text class="t{style.classes}" x="{x:.5g}" y="14" textLength="{width:.5g}">'
                    f"{escape(word[0], quote=False)}</text>"
                )
        else:
            draw = _blocks if shape == "v" else _lines
            parts.append(f'<path class="{shape}{style.classes}" d="{draw(text, place)}"/>')
            if below := _lines(text.translate(_LIGHT_BELOW), place, "╷"):
                parts.append(f'<path class="l{style.classes}" d="{below}"/>')
        place += len(text)
    return "".join(parts)


def _blocks(text: str, place: int) -> str:
    drawn = []
    for level, cells in groupby(enumerate(text, place), lambda cell: cell[1]):
        columns = [column for column, _ in cells]
        height = (_LEVELS.index(level) + 1) * 14 / 8
        drawn.append(f"M{columns[0] * _CELL:.5g} 16h{len(columns) * _CELL:.4g}v{-height:.4g}H{columns[0] * _CELL:.5g}z")
    return "".join(drawn)


def _lines(text: str, place: int, only: str = "") -> str:
    drawn = []
    for character, cells in groupby(enumerate(text, place), lambda cell: cell[1]):
        if only and character not in only:
            continue
        columns, ends, middle = [column for column, _ in cells], _ENDS[character], _LINE / 2
        if ends == "lr":
            drawn.append(f"M{columns[0] * _CELL:.5g} {middle:g}h{len(columns) * _CELL:.4g}")
            continue
        for column in columns:
            x, half = column * _CELL, _CELL / 2
            moves = {"l": f"h{-half:g}", "r": f"h{half:g}", "u": "V0", "d": f"V{_LINE}"}
            drawn += [f"M{x + half:.5g} {middle:g}{moves[end]}" for end in ends]
    return "".join(drawn)


def animated_svg(
    frames: Sequence[tuple[float, tuple[Row, ...]]], ends: float, columns: int, title: str, description: str
) -> str:
    """One picture that shows each screen from its second on, the last until ``ends``, over and over.

    It holds CSS alone, no script. Where motion is not wanted, or animation not known, the last screen stands.
    """
    shown: dict[tuple[float, float], list[tuple[int, Row]]] = {}
    times = [*(at for at, _ in frames), ends]
    for line, rows_in_time in enumerate(zip(*(screen for _, screen in frames), strict=True)):
        for row, run in groupby(enumerate(rows_in_time), itemgetter(1)):
            numbers = [number for number, _ in run]
            if row:
                shown.setdefault((times[numbers[0]], times[numbers[-1] + 1]), []).append((line, row))
    rows_once = dict.fromkeys(row for rows in shown.values() for _, row in rows)
    names = {row: f"r{number}" for number, row in enumerate(rows_once)}
    rules, groups = [], []
    for number, ((begins, until), rows) in enumerate(sorted(shown.items())):
        stages = {0.0: "hidden", begins: "visible"} | ({until: "hidden"} if until < ends else {})
        steps = "".join(f"{100 * at / ends:.4g}%{{visibility:{state}}}" for at, state in sorted(stages.items()))
        rest = "" if until < ends else "visibility:visible;"
        rules.append(f"@keyframes k{number}{{{steps}}}#f{number}{{{rest}animation-name:k{number}}}")
        uses = "".join(f'<use href="#{names[row]}" y="{line * _LINE}"/>' for line, row in rows)
        groups.append(f'<g id="f{number}" class="f">{uses}</g>')
    width, height = columns * _CELL + 2 * _MARGIN, len(frames[0][1]) * _LINE + 2 * _MARGIN
    definitions = "\n".join(f'<g id="{name}">{_row_svg(row)}</g>' for row, name in names.items())
    timing = f".f{{visibility:hidden;animation:{ends:.4g}s step-end infinite}}"
    still = "@media(prefers-reduced-motion:reduce){.f{animation-name:none!important}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}" '
        f'role="img" aria-labelledby="title description">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="description">{escape(description)}</desc>\n<style>{_STYLE}{timing}\n'
        + "\n".join(rules)
        + f"\n{still}</style>\n<defs>\n{definitions}\n</defs>\n"
        f'<rect class="card" x=".5" y=".5" width="{width - 1:g}" height="{height - 1}" rx="8"/>\n'
        f'<g transform="translate({_MARGIN} {_MARGIN})">\n' + "\n".join(groups) + "\n</g>\n</svg>\n"
    )
