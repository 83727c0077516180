"""The panel of a real run on a pseudo-terminal of four widths: Ctrl-C, the modes of the terminal, the resumed run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal_screen import screen

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.demo.run_demo import MATERIAL

STEPS = 60
_LOADED = """
import os, sys
import llamatune.commands._progress_bars as bars, llamatune.training.train, llamatune.tracking.trackers
from llamatune.cli import main
bars._REDRAWN_EVERY_S = 0.0
for line in sys.stdin:
    terminal, folder = line.split()
    child = os.fork()
    if not child:
        os.setsid()
        descriptor = os.open(terminal, os.O_RDWR)  # from here on the terminal that controls this process
        for number in (0, 2):
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        os.chdir(folder)
        main(["train", "run.yaml", "--json"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A process with the libraries loaded. It runs a training in a new session on each terminal that it is told."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", _LOADED], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def prepared_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rows") / "prepared"
    rows, tokenizer = MATERIAL / "held_out.jsonl", MATERIAL / "base" / "tokenizer.model"
    prepare_data(PrepareOptions([rows], tokenizer, place, limit=20, validation_fraction=0.2))
    return place


class _Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self, width: int) -> None:
        self.width, self.written = width, b""
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, width, 0, 0))
        self.name = os.ttyname(self._theirs)

    def read(self, seconds: float) -> None:
        if select.select([self._ours], [], [], seconds)[0]:
            self.written += os.read(self._ours, 1 << 16)

    def press_ctrl_c(self) -> None:
        """After the return key, which would move the cursor too."""
        os.write(self._ours, b"\r\x03")

    def modes(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def rows(self) -> list[str]:
        return screen(self.written.decode(), self.width)

    def close(self) -> None:
        os.close(self._ours)
        os.close(self._theirs)


def _run(process: subprocess.Popen[str], folder: Path, terminal: _Terminal, press_at: str | None = None) -> int:
    """The exit code of a training that Ctrl-C is pressed in when the terminal was sent that text."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{terminal.name} {folder}\n")
    process.stdin.flush()
    ends = time.monotonic() + 120
    while not select.select([process.stdout], [], [], 0)[0]:
        assert time.monotonic() < ends, terminal.written
        terminal.read(0.05)
        if press_at is not None and press_at in terminal.written.decode(errors="replace"):
            terminal.press_ctrl_c()
            press_at = None
    code = int(process.stdout.readline())
    while select.select([terminal._ours], [], [], 0)[0]:
        terminal.read(0)
    return code


def _panel(terminal: _Terminal) -> list[str]:
    """The rows of the panel, which is there once and whole."""
    rows = terminal.rows()
    corners = [(number, row[0]) for number, row in enumerate(rows) if row and row[0] in "╭╰"]
    assert [corner for _, corner in corners] == ["╭", "╰"], "\n".join(rows)
    panel = rows[corners[0][0] : corners[1][0] + 1]
    assert {len(row) for row in panel} == {terminal.width}, "\n".join(panel)
    assert {row[0] + row[-1] for row in panel[1:-1]} == {"││"}
    return panel


def _curve(panel: list[str]) -> str:
    (line,) = [row for row in panel if row.startswith("│ loss ")]
    found = re.search(r"perplexity \S+  ([▁▂▃▄▅▆▇█]+) │$", line)
    assert found, "the curve is as wide as the room beside the loss"
    return found[1]


@pytest.mark.parametrize("width", [48, 80, 100, 140])
def test_a_run_is_stopped_by_ctrl_c_and_goes_on_in_whole_panels(
    loaded: subprocess.Popen[str], prepared_rows: Path, tmp_path: Path, width: int
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {MATERIAL / 'base'}, dtype: float32}}\nlora: {{r: 2}}\ndata: {{train: {prepared_rows}}}\n"
        f"training: {{output_dir: run, max_steps: {STEPS}, gradient_accumulation_steps: 1, precision: fp32}}\n"
        f"evaluation: {{every_steps: {STEPS}}}\n"
    )
    stopped, resumed = _Terminal(width), _Terminal(width)
    before = stopped.modes()
    assert _run(loaded, tmp_path, stopped, press_at="step 2 of") == 75, "\n".join(stopped.rows())
    assert stopped.modes() == before, "the modes of the terminal are restored"
    assert b"^C" not in stopped.written
    assert b"\x03" not in stopped.written
    _panel(stopped)
    assert stopped.written.decode().count("╭") > 3, "it was never redrawn"
    assert "error: stopped by a signal after step " in "".join(stopped.rows()), "the error comes below the panel"

    assert _run(loaded, tmp_path, resumed) == 0, "\n".join(resumed.rows())
    panel = _panel(resumed)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["event"] == "step"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(losses) == STEPS
    curve = _curve(panel)
    if len(curve) >= STEPS:  # each update has a column of its own: the highest of all are those of the curve
        columns = [curve[-(-number * len(curve) // STEPS)] for number in range(STEPS)]
        ordered = [level for _, level in sorted(zip(losses, columns, strict=True))]
        assert ordered == sorted(ordered)
    found = " ".join(" ".join(row.strip("│") for row in panel[1:-1]).split())
    for words in (
        f"step {STEPS} of {STEPS}", "weights 4.1 MiB, adapter", " KiB, optimizer", "tokens/s", f"step-{STEPS:06d}",
        f"{summary['best_eval_loss']:.4f}",
    ):  # fmt: skip
        assert words in found, found
    stopped.close()
    resumed.close()
