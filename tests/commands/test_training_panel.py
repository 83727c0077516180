"""The panel of a run: the same numbers at every width, on every terminal, and drawn seldom."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.table import Column, Table
from terminal_screen import screen

from llamatune.commands import _progress_bars as _progress_display
from llamatune.commands._console import Console
from llamatune.commands._progress_bars import ProgressBars, open_console, speaks_utf8
from llamatune.commands._training_panel import Curve, TrainingPanel, own_lines
from llamatune.events import (
    CheckpointSaved,
    Command,
    EvalDone,
    Event,
    MemoryHeld,
    Notice,
    Progress,
    RunStarted,
    StepDone,
)  # fmt: skip

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _step(step: int, loss: float, reserved: int | None = 15 * GIB) -> StepDone:
    return StepDone(
        step=step, total_steps=1000, window=step, epoch=step / 400, num_epochs=3, loss=loss, learning_rate=2e-4,
        grad_norm=1.25, loss_scale=1.0, target_tokens=4096, tokens_per_second=2345.6, peak_memory_bytes=14 * GIB,
        elapsed_s=1.5 * step, peak_reserved_bytes=reserved,
    )  # fmt: skip


def _run() -> Iterator[Event]:
    yield RunStarted(1, 1, 1, 1, 1000, 3, 0, "cuda:0")
    for step in range(1, 501):
        yield _step(step, 1 + 250 / step if step > 250 else 4 - step / 125)
        if step == 1:
            yield MemoryHeld(12 * GIB, 16 << 20, 32 << 20, 79 * GIB)
        if step in (200, 400):
            yield EvalDone(step, 1.5 + (step == 400) / 4, 4.4817, step == 200)
            yield CheckpointSaved(step, f"runs/alpaca/checkpoints/step-{step:06d}", 0.314)


def _drawn(events: Iterator[Event] | list[Event], width: int, monkeypatch: pytest.MonkeyPatch, locale: str) -> str:
    """A panel in black and white on a terminal of that width and locale."""
    monkeypatch.setenv("LC_ALL", locale)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    started, *others = events
    assert isinstance(started, RunStarted)
    panel, file = TrainingPanel(started), Terminal()
    for event in others:
        panel.note(event)
    open_console(file).print(panel)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


SNAPSHOT = """
╭─ training on cuda:0 ─────────────────────────────────────╮
│ ━━━━━━━━━━━╸             step 500 of 1,000, epoch 2 of 3 │
│ loss         1.5000, perplexity 4.48  ██▇▇▆▅▄▄▃▂▂▂▂▁▁▁▁▁ │
│ update       learning rate 2.00e-04, gradient norm 1.25  │
│ speed        2,346 tokens/s                              │
│ time         12:30 min elapsed, 12:30 min left           │
│ peak memory  14.00 GiB of 79.00 GiB, 15.00 GiB reserved  │
│ of which     weights 12.00 GiB, adapter 16.0 MiB,        │
│              optimizer 32.0 MiB                          │
│ validation   1.7500, perplexity 4.48 at step 400; best   │
│              1.5000 at step 200                          │
│ checkpoint   step-000400, saved in 0.31 s                │
╰──────────────────────────────────────────────────────────╯
"""


def test_a_panel_as_it_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _drawn(_run(), 60, monkeypatch, "C.UTF-8").strip() == SNAPSHOT.strip()


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_number_is_there_at_every_width(width: int, locale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _drawn(_run(), width, monkeypatch, locale)
    lines = drawn.rstrip("\n").split("\n")
    assert {cell_len(line) for line in lines} == {width}
    words = " ".join(re.sub(r"[|│]", " ", drawn).split())
    for shown in (
        "step 500 of 1,000, epoch 2 of 3", "1.5000, perplexity 4.48", "learning rate 2.00e-04, gradient norm 1.25",
        "2,346 tokens/s", "12:30 min elapsed, 12:30 min left", "14.00 GiB of 79.00 GiB, 15.00 GiB reserved",
        "weights 12.00 GiB, adapter 16.0 MiB, optimizer 32.0 MiB", "1.7500, perplexity 4.48 at step 400; best 1.5000 "
        "at step 200", "step-000400, saved in 0.31 s",
    ):  # fmt: skip
        assert shown in words
    assert drawn.isascii() is (locale == "C")
    curve = next(line for line in lines if "loss" in line).split()[-2]
    assert curve[0] == ("#" if locale == "C" else "█")
    assert curve[-1] == ("_" if locale == "C" else "▁")


def test_what_is_not_known_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    started = next(_run())
    assert len(_drawn([started], 60, monkeypatch, "C").splitlines()) == 3
    one = _drawn([started, _step(1, 2.0, reserved=None)], 60, monkeypatch, "C")
    assert "14.00 GiB, resident" in one
    assert not [word for word in ("left", "validation", "checkpoint", "of which", "reserved") if word in one]
    whole = [started, _step(1, 2.0), MemoryHeld(0, 12 * GIB, 24 * GIB, 79 * GIB)]
    assert "weights 12.00 GiB, optimizer 24.00 GiB" in _drawn(whole, 80, monkeypatch, "C")


@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.integers(1, 50))
def test_a_sparkline_keeps_the_order_of_what_fits(values: list[float], width: int) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    line = curve.sparkline(width)
    assert len(line) == (width if values else 0)
    if 0 < len(values) <= width:
        first_columns = [-(-number * width // len(values)) for number in range(len(values))]
        ordered = [level for _, level in sorted(zip(values, (line[at] for at in first_columns), strict=True))]
        assert ordered == sorted(ordered)


def test_a_sparkline_of_a_long_run_is_made_of_means() -> None:
    """A saw of two values is as flat as its mean; what comes later is further right."""
    curve = Curve()
    for number in range(40_000):
        curve.add(number % 2 + (3 if number < 10_000 else 0))
    line = curve.sparkline(40)
    assert set(line[:9]) == {"█"}
    assert set(line[11:]) == {"▁"}


def test_a_run_that_goes_on_continues_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panel after 500 steps in one process, and after 300 in one and 200 in the next."""
    steps = [event for event in _run() if isinstance(event, StepDone)]
    started = next(_run())
    assert isinstance(started, RunStarted)
    before = tuple(step.loss for step in steps[:300])
    resumed = dataclasses.replace(started, resumed_step=300, losses=before)
    panels = [_drawn(events, 80, monkeypatch, "C.UTF-8") for events in ([started, *steps], [resumed, *steps[300:]])]
    curves = [next(line for line in panel.splitlines() if " loss" in line) for panel in panels]
    assert curves[0] == curves[1]
    assert "left" in panels[1]


@pytest.mark.parametrize(
    ("settings", "utf8"),
    [
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C", "LC_CTYPE": "C.utf8"}, True),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "de_DE.ISO-8859-1", "LC_ALL": ""}, False),
        ({}, False),
    ],
)
def test_the_locale_says_what_a_terminal_shows(
    settings: dict[str, str], utf8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LANG", "LC_CTYPE", "LC_ALL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert speaks_utf8() is utf8


def test_it_is_drawn_twice_a_second_at_most_and_in_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 steps in three seconds of a clock that the test turns."""
    monkeypatch.setenv("TERM", "xterm")
    now, drawings = [100.0], []
    monkeypatch.setattr(_progress_display.time, "monotonic", lambda: now[0])
    threads = threading.active_count()
    drawing = ProgressBars(open_console(Terminal()))
    monkeypatch.setattr(drawing._live, "refresh", lambda: drawings.append(now[0]))
    for event in [next(_run()), *(_step(number, 1.0) for number in range(1, 301))]:
        drawing.draw(event)
        now[0] += 0.01
    assert threading.active_count() == threads
    drawing.close()
    *seldom, _ = drawings  # the last is of closing
    assert 6 <= len(seldom) <= 7
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(seldom))


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", kind)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console(json_mode=True) as console:
        console.on_event(next(_run()))
        console.on_event(_step(1, 2.0))
    assert ("loss=2.0000 learning_rate=0.0002" in terminal.getvalue()) is (kind == "dumb")
    assert ("\x1b[" in terminal.getvalue()) is (kind != "dumb")


def test_bars_and_warnings_stand_beside_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(_progress_display, "_REDRAWN_EVERY_S", 0.0)
    terminal = Terminal()
    drawing = ProgressBars(open_console(terminal))
    for event in [next(_run()), _step(1, 2.0), Progress("evaluating", 3, 8), Notice("[odd] \x1b[31m name", "warning")]:
        drawing.draw(event)
    drawing.draw(Progress("evaluating", 8, 8))
    drawing.close()
    rows = screen(terminal.getvalue(), 80)
    assert r"warning: [odd] \x1b[31m name" in rows
    assert "evaluating" in terminal.getvalue()
    assert not [row for row in rows if "evaluating" in row], "a task that is done takes its bar away"


def test_a_command_is_one_line_however_narrow_the_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    drawing = ProgressBars(open_console(terminal))
    line = f"llamatune prepare-data {'folder/' * 30}rows.jsonl --output [odd]"
    drawing.draw(Command(line))
    drawing.close()
    assert f"$ {line}" in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "every parameter"])
def test_memory_is_told_as_counting_parameters_gives_it(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, whole: bool
) -> None:
    """fp32 weights, and AdamW's two moments and one count a tensor."""
    from llamatune.spec import build_spec
    from llamatune.training.train import train

    training = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "precision": "fp32", "device": "cpu"}
    values = {
        "model": {"path": str(tiny_base()), "dtype": "float32"}, "data": {"train": str(prepared())},
        "training": training, **({} if whole else {"lora": {"r": 3}}),
    }  # fmt: skip
    events: list[Event] = []
    summary = train(build_spec(values, "test"), on_event=events.append)
    (held,) = [event for event in events if isinstance(event, MemoryHeld)]
    trained, frozen = summary["trainable_parameters"], summary["total_parameters"] - summary["trainable_parameters"]
    tensors = 3 + 3 * 9 if whole else 2 * 2 * 3
    assert held.trained_bytes == 4 * trained
    assert held.optimizer_bytes == 2 * 4 * trained + 4 * tensors
    assert held.device_bytes > held.frozen_bytes
    extra = held.frozen_bytes - 4 * frozen
    assert 0 <= extra <= 64 << 10, "more than tables of angles is held beside the weights"


def test_a_narrow_panel_folds_the_loss_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _drawn(_run(), 40, monkeypatch, "C.UTF-8")
    assert {cell_len(line) for line in drawn.rstrip("\n").split("\n")} == {40}
    assert "4.48" in " ".join(drawn.split()).split("update")[0]
    assert "\u2026" not in drawn


ALPACA = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n"


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        ([ALPACA.format("Where is Belby?"), ALPACA.format("Who\nis Emil?")], ["Where is Belby?", "Who\nis Emil?"]),
        ([ALPACA.format("Where is Belby?"), "x" * 50 + "\n\n### Response:\n", ALPACA.format("Who?")],
         ["Where is Belby?", "x" * 50, "Who?"]),
        (["Where is Belby?", "Who?"], ["Where is Belby?", "Who?"]),
        (["one\ntwo"], ["one\ntwo"]),
        (["one", "one"], ["one", "one"]),
        (["a\nb\nc", "x" * 4000], ["a\nb\nc", "x" * 4000]),
        (["a\nq\nz", "a\nz"], ["q\nz", "z"]),
    ],
)  # fmt: skip
def test_of_prompts_the_lines_of_their_template_are_left_out(prompts: list[str], shown: list[str]) -> None:
    assert own_lines(prompts) == shown


TABLES = {
    "epochs": (
        ("epoch", "train\nloss", "train\nperplexity", "validation\nloss", "validation\nperplexity", "tokens/s"),
        ("3", "9.1438", "9356.00", "10.5313", "37469.40", "3,174"),
        28,
    ),
    "four columns": (("a", "b", "c", "d"), ("12345.6789", "2", "98765.4321", "0.5"), 14),
    "counts": (("module (all blocks together)", "base", "adapter"), ("q_proj", "6,738,415,616", "39,976,960"), 26),
    "runs": (("run", "steps", "loss", "time"), ("r=8,learning_rate=0.001", "1,200", "0.8468", "12:34:56"), 32),
}  # fmt: skip
"""Headings, cells, and the least width in which a word and its heading stand on one line."""


@pytest.mark.parametrize("name", TABLES)
def test_no_figure_of_a_table_is_cut_or_broken_at_any_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    headings, cells, least = TABLES[name]
    shapes = []
    for width in range(least, 121):
        for variable, value in {"LC_ALL": "C.UTF-8", "COLUMNS": str(width), "NO_COLOR": "1", "TERM": "xterm"}.items():
            monkeypatch.setenv(variable, value)
        table, file = Table(*(Column(heading, justify="right") for heading in headings), title="per epoch"), Terminal()
        table.add_row(*cells)
        table.add_row(*cells)
        open_console(file).print(table)
        drawn = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
        assert max(map(cell_len, drawn.splitlines())) <= width
        for cell in cells:
            assert len(re.findall(rf"(?<!\S){re.escape(cell)}(?!\S)", drawn)) == 2, (width, drawn)
        shapes.append("\u2502" in drawn)
    assert shapes == sorted(shapes), "lines from some width on"
    assert shapes[-1]
