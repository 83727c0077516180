"""What a terminal shows after what was written to it: lines, a cursor that goes up, erased lines, wrapping."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|[\s\S]")


def screen(written: str, width: int) -> list[str]:
    """The rows at the end; a control that rich is not known to use is a fault.

    After a character in the last column the cursor stays there until the next one, which begins a new row.
    """
    rows: list[list[str]] = [[]]
    y = x = 0

    def go_down() -> None:
        nonlocal y
        y += 1
        if y == len(rows):
            rows.append([])

    for token in _TOKEN.findall(written):
        if token.startswith("\x1b["):
            count = int(re.sub(r"\D", "", token) or 1)
            if token[-1] == "A":
                y = max(0, y - count)
            elif token[-1] == "K":
                rows[y] = []
            else:
                assert token[-1] in "mhl", token
        elif token == "\r":
            x = 0
        elif token == "\n":
            go_down()
        else:
            if x == width:
                go_down()
                x = 0
            rows[y] += [" "] * (x + 1 - len(rows[y]))
            rows[y][x] = token
            x += 1
    return ["".join(row).rstrip() for row in rows]
