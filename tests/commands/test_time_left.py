"""The time left of a run and of a task, by a clock that the test turns; rows of an unknown number as progress."""

from __future__ import annotations

import io
import re

import pytest

from llamatune.commands import _log_lines, _time_left
from llamatune.commands._log_lines import KeyValueLines
from llamatune.commands._progress_bars import ProgressBars, open_console
from llamatune.commands._time_left import RunTimeLeft, TaskTimeLeft
from llamatune.events import Progress, StepDone


def _step(step: int, elapsed_s: float) -> StepDone:
    return StepDone(
        step=step, total_steps=100, window=step, epoch=step / 50, num_epochs=2, loss=2.0, learning_rate=1e-4,
        grad_norm=1.0, loss_scale=1.0, target_tokens=1, tokens_per_second=1.0, peak_memory_bytes=1, elapsed_s=elapsed_s,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    for module in (_time_left, _log_lines):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_run_goes_on_at_its_pace_since_the_first_update_of_the_process() -> None:
    """That update, which took a minute, is left out; so is the time of earlier processes."""
    left = RunTimeLeft()
    assert left.after(_step(41, 1000.0 + 60)) is None
    assert left.after(_step(42, 1000.0 + 62)) == pytest.approx(2 * 58)
    assert left.after(_step(44, 1000.0 + 69)) == pytest.approx(3 * 56)
    assert left.after(_step(100, 2000.0)) == 0


def test_a_task_goes_on_at_its_pace(clock: list[float]) -> None:
    left = TaskTimeLeft()
    assert left.after(Progress("generating", 0, 40)) is None
    clock[0] += 5
    assert left.after(Progress("generating", 10, 40)) == pytest.approx(15)
    assert left.after(Progress("rows encoded", 70, part=0.5)) is None
    clock[0] += 3
    assert left.after(Progress("rows encoded", 90, part=0.75)) == pytest.approx(3)
    assert left.after(Progress("reading", 7)) is None
    assert left.after(Progress("generating", 40, 40)) == 0


def test_progress_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Of each task a line every ten seconds, with what is known of the end; none of a short one."""
    lines = KeyValueLines(1)
    for event, seconds in (
        (Progress("rows encoded", 0, part=0.0), 12), (Progress("rows encoded", 500, part=0.25), 1),
        (Progress("rows encoded", 520, part=0.26), 1), (Progress("evaluating", 1, 10), 5),
        (Progress("evaluating", 10, 10), 30), (Progress("evaluating", 1, 10), 5), (Progress("evaluating", 10, 10), 0),
        (Progress("generating", 3, 12, 41.7), 24), (Progress("generating", 9, 12, 40.2), 12),
        (Progress("reading", 7), 12),
        (Progress("reading", 9), 12), (Progress("generating", 12, 12, 40.2), 0),
    ):  # fmt: skip
        lines.draw(event)
        clock[0] += seconds
    told = [line.split(" ", 1) for line in capsys.readouterr().err.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", time) for time, _ in told)
    assert [line for _, line in told] == [
        "progress rows_encoded=500 percent=25 left=0:00:36",
        "progress generating=9/12 tokens_per_second=40 left=0:00:12",
        "progress reading=9",
        "progress generating=12/12 tokens_per_second=40 left=0:00:00",
    ]


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Progress("rows encoded", 12345, part=0.4), "rows encoded ━━━━━━━━━╸ 12,345"),
        (Progress("bytes verified", 3 << 29, 3 << 30, in_bytes=True), "1.50 GiB of 3.00 GiB"),
        (Progress("generating", 1000, 4000, 41.7), "1,000/4,000"),
    ],
)  # fmt: skip
def test_progress_on_a_terminal_counts_what_people_count(
    event: Progress, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    bars = ProgressBars(open_console(io.StringIO()))
    bars.draw(event)
    out = io.StringIO()
    open_console(out).print(bars._drawing())
    bars.close()
    assert shown.replace(" ", "") in out.getvalue().replace(" ", "").replace("━", "━")
