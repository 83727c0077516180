"""``llamatune convert-adapter``: an adapter in another tool's layout."""

from __future__ import annotations

from dataclasses import asdict

from llamatune.command_options.conversion import ConvertAdapterOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable


def convert_adapter(options: ConvertAdapterOptions, console: Console) -> None:
    """Write an adapter for another tool: PEFT, mlx-lm, llama.cpp."""
    with console:  # signals are handled from here on, also while torch is imported
        from llamatune.checkpoints.converting_adapters import convert_adapter as run_conversion

        if console.should_stop():
            raise Stopped("stopped before converting", options.output, "run the same command again")
        report = run_conversion(options, console.on_event, console.should_stop)

        def human(out: RichConsole) -> None:
            note = "already converted, left as it is: " if report.already_done else "written to "
            out.print(note + printable(report.output))
            out.print(f"{report.updates:,} updates of rank {report.r} at most, {report.format} layout")

        console.result(asdict(report), human)
