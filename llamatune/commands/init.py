"""``llamatune init``: a commented run spec that fits a model, rows and a device."""

from __future__ import annotations

from llamatune.command_options.starting_spec import InitOptions
from llamatune.commands._console import Console


def init(options: InitOptions, console: Console) -> None:
    """Write a commented run spec that fits the memory."""
    with console:
        from llamatune.errors import printable
        from llamatune.output_files import write_output
        from llamatune.starting_spec.make_spec import make_spec

        made = make_spec(options, console.on_event, console.should_stop)
        payload = {"output": None if options.output is None else str(options.output), **made.facts()}
        if options.output is None:
            console.result(payload, lambda out: out.out(made.text, end="", highlight=False))
            return
        write_output(options.output, made.text.encode(), options.overwrite)
        following = made.prepare or f"llamatune train {options.output} --dry-run"
        console.result(payload, lambda out: out.out(printable(f"written; next: {following}"), highlight=False))
