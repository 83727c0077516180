"""The report page of a sweep: all its runs compared, as ``llamatune report`` does it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from llamatune.command_options.training import ReportOptions
from llamatune.events import Notice, OnEvent, ShouldStop
from llamatune.reporting.make_report import make_report
from llamatune.training.run_file_names import METRICS, SPEC, SUMMARY


def write_page(page: Path, runs: Sequence[Path], on_event: OnEvent, should_stop: ShouldStop) -> bool:
    """Write the page about runs that have begun, unless it is newer than all of them; whether there is one."""
    begun = [run for run in runs if all((run / name).is_file() for name in (SPEC, METRICS))]
    if not begun:
        return False
    if page.is_file() and all(_changed(run) < page.stat().st_mtime for run in begun):
        return True
    if importlib.util.find_spec("matplotlib") is None:
        on_event(Notice("no page without matplotlib: pip install matplotlib"))
        return False
    make_report(ReportOptions(runs=begun, output=page, overwrite=True), on_event, should_stop)
    return True


def _changed(run: Path) -> float:
    files = [run / name for name in (METRICS, SUMMARY, SPEC)]
    return max(file.stat().st_mtime for file in files if file.is_file())
