"""``llamatune verify``: the files of a directory checked against its manifest."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llamatune.command_options.inspection import VerifyOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable

if TYPE_CHECKING:
    from llamatune.verification import Verified


def verify(options: VerifyOptions, console: Console) -> None:
    """Check every byte of a directory against its manifest."""
    with console:  # signals are handled from here on, also while torch is imported
        from llamatune.verification import verify as run_verification

        if console.should_stop():
            raise Stopped("stopped before anything was read", options.directory, "run the same command again")
        report = run_verification(options.directory, console.on_event, console.should_stop, options.variant)
        console.result(asdict(report), lambda out: _print_report(out, report))


def _print_report(out: RichConsole, report: Verified, indent: str = "") -> None:
    what = {"content": "every byte is", "structure": "headers and tensors are"}[report.checked]
    line = f"{indent}{printable(report.path)}: {report.kind}, {report.files:,} files, {report.bytes:,} bytes"
    out.print(line if indent else f"{line}: {what} in order")
    for part in report.parts:
        _print_report(out, part, indent + "  ")
    if report.steps is not None:
        out.print(f"{report.steps:,} steps, {'finished' if report.finished else 'not finished'}")
    if report.unlisted:
        names = ", ".join(printable(name) for name in report.unlisted[:5]) + (" ..." if report.unlisted[5:] else "")
        out.print(f"{indent}files that the manifest does not list, not checked: {names}")
