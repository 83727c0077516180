"""Records README's first commands on a terminal, and the page about their run: ``python docs/make_recording.py``.

It takes about a minute, and writes ``recording.svg``, ``loss.svg`` and ``example-report.html`` beside itself.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from terminal_svg import Row, Screen, animated_svg

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COLUMNS, ROWS = 100, 28
SPEED = 3.0
"""How much faster than it ran it is played."""

_LONGEST_S = 0.5  # of a screen while a command runs, as played
_SHORTEST_S = 0.3
_READ_S = {"llamatune": 1.0, "prepare-data": 3.0, "train": 4.0, "generate": 9.0}  # a command, and what each verb left
_ONE_WRITE_S = 0.04  # what follows sooner belongs to the same screen
_SHOWN_PLACE = "~/llamatune"
_TITLE = "llamatune prepares rows, trains and compares answers"


def recorded_commands() -> list[str]:
    """The commands below README's recording, a line that ends in a backslash with those that continue it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\(docs/recording\.svg\).*?^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found is not None, "README has no commands below the recording"
    return re.findall(r"(?:.*\\\n)*.+\n", found[1])


def run_on_terminal(command: str, place: Path) -> list[tuple[float, str]]:
    """Run a command in ``place`` on a pseudo-terminal; what it wrote, each with the seconds since its start.

    Raises:
        SystemExit: it failed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-16color", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        environment.pop(name, None)
    line = command.replace("llamatune", f"{sys.executable} -m llamatune", 1)
    process = subprocess.Popen(
        ["sh", "-c", line], cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    start, written = time.monotonic(), []
    while True:
        select.select([ours], [], [])
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        now = time.monotonic() - start
        if written and now - written[-1][0] < _ONE_WRITE_S:
            written[-1] = (now, written[-1][1] + block)
        else:
            written.append((now, block))
    os.close(ours)
    if code := process.wait():
        raise SystemExit(f"{command} ended with {code}")
    return [(at, block.decode().replace(str(place), _SHOWN_PLACE)) for at, block in written]


def play(commands: list[str], place: Path) -> tuple[list[tuple[float, tuple[Row, ...]]], float]:
    """Run the commands one after another; each screen with the second at which it is shown, and the end."""
    screen, frames, clock = Screen(COLUMNS, ROWS), [], 0.0
    for command in commands:
        verb = command.split()[1]
        screen.write("\x1b[1m$ " + command.rstrip().replace("\n", "\r\n> ") + "\x1b[0m\r\n")
        frames.append((clock, screen.rows()))
        clock += _READ_S["llamatune"]
        before = 0.0
        for at, text in run_on_terminal(command, place):
            clock += min((at - before) / SPEED, _LONGEST_S)
            before = at
            screen.write(text)
            if clock - frames[-1][0] < _SHORTEST_S:  # too short to be seen
                frames[-1] = (frames[-1][0], screen.rows())
            else:
                frames.append((clock, screen.rows()))
        clock += _READ_S[verb]
    return frames, clock


def main() -> None:
    """Run the commands in an empty directory that has what a checkout has, and write the three files."""
    commands = recorded_commands()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        for name in ("llamatune", "examples"):
            (place / name).symlink_to(ROOT / name)
        frames, ends = play(commands[:-1], place)
        described = " Then: ".join(" ".join(command.replace("\\\n", " ").split()) for command in commands[:-1])
        picture = animated_svg(frames, ends, COLUMNS, _TITLE, described)
        run_on_terminal(commands[-1], place)  # report
        (DOCS / "recording.svg").write_text(picture, encoding="utf-8")
        shutil.copyfile(place / "charts" / "loss.svg", DOCS / "loss.svg")
        shutil.copyfile(place / "report.html", DOCS / "example-report.html")


if __name__ == "__main__":
    main()
