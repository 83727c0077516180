"""``llamatune merge-lora``: a base and an adapter in, one model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


def merge_lora(
    # readable=False throughout: typer would call a missing permission a mistake of usage; to us it is exit code 5.
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="The base model, Hugging Face's or Meta's.", readable=False)
    ],
    adapter: Annotated[
        Path, typer.Option("--adapter", metavar="DIR", help="The adapter, a PEFT directory.", readable=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The model directory to make.", readable=False)
    ],
    format_name: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="same, hf or meta: the layout of the files.")
    ] = "same",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="same, float32, bfloat16 or float16: of the weights.")
    ] = "same",
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept an adapter that was trained on another base.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --output.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base: in fp32, rounded once."""
    from llamatune.commands._console import Console

    with Console(json_mode, writes=True) as console:  # it hears signals from here on, while torch is loaded too
        from llamatune.errors import SpecError, Stopped, printable

        for option, value, known in (
            ("--format", format_name, ("same", "hf", "meta")),
            ("--dtype", dtype, ("same", "float32", "bfloat16", "float16")),
        ):
            if value not in known:
                raise SpecError(f"{value!r} is unknown", option, f"choose one of {', '.join(known)}")
        from dataclasses import asdict

        from llamatune.checkpoints.merging import MergeOptions
        from llamatune.checkpoints.merging import merge_lora as run_merge

        if console.should_stop():
            raise Stopped("stopped before merging", output, "run the same command again")
        report = run_merge(
            MergeOptions(model, adapter, output, format_name, dtype, force_base, overwrite),  # type: ignore[arg-type]
            console.on_event,
            console.should_stop,
        )

        def human(out: RichConsole) -> None:
            note = "already merged, left as it is: " if report.already_done else "written to "
            out.print(note + printable(report.output), markup=False)
            out.print(
                f"{report.merged_tensors:,} of {report.tensors:,} tensors changed, stored as {report.dtype} "
                f"({report.bytes:,} bytes, {report.format} format)"
            )
            out.print(
                f"rounding: at most {report.max_abs_error:.3g} a weight; {report.vanished_fraction:.1%} of the changed "
                "weights fell back onto the base's value"
            )
            if report.vanished_fraction > 0.1:
                out.print("keep more of the update with --dtype float32, or use base and adapter side by side")

        console.result(asdict(report), human)
