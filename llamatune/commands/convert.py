"""``llamatune convert``: a model in another format."""

from __future__ import annotations

from dataclasses import asdict

from llamatune.command_options.conversion import ConvertOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable


def convert(options: ConvertOptions, console: Console) -> None:
    """Change a model's format: Hugging Face's, Meta's, GGUF."""
    from llamatune.checkpoints.copies_ahead import copying_while_importing

    with console, copying_while_importing(options) as begun:  # signals are handled from here on
        from llamatune.checkpoints.converting import convert as run_conversion

        if console.should_stop():
            raise Stopped("stopped before converting", options.output, "run the same command again")
        report = run_conversion(options, console.on_event, console.should_stop, begun)

        def human(out: RichConsole) -> None:
            note = "already converted, left as it is: " if report.already_done else "written to "
            out.print(note + printable(report.output))
            stored = f"{report.bytes:,} bytes of weights as {report.dtype}, {report.format} format"
            out.print(f"{report.tensors:,} tensors, {stored}")
            if report.sha256 is not None:
                out.print(f"sha256 {report.sha256}")

        console.result(asdict(report), human)
