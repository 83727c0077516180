"""``llamatune merge-lora``: a base and adapters merged into one model."""

from __future__ import annotations

from dataclasses import asdict

from llamatune.command_options.inference import MergeOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable


def merge_lora(options: MergeOptions, console: Console) -> None:
    """Fold adapters into their base: in fp32, rounded once."""
    from llamatune.checkpoints.copies_ahead import copying_while_importing

    with console, copying_while_importing(options) as begun:  # signals are handled from here on
        from llamatune.checkpoints.merging import merge_lora as run_merge

        if console.should_stop():
            raise Stopped("stopped before merging", options.output, "run the same command again")
        if options.probe is None:
            report = run_merge(options, console.on_event, console.should_stop, begun=begun)
        else:
            from llamatune.merge_proof import merge_and_prove

            report = merge_and_prove(options, console.on_event, console.should_stop)

        def human(out: RichConsole) -> None:
            note = "already merged, left as it is: " if report.already_done else "written to "
            out.print(note + printable(report.output))
            changed = f"{report.merged_tensors:,} of {report.tensors:,} tensors changed"
            out.print(f"{changed}, stored as {report.dtype} ({report.bytes:,} bytes, {report.format} format)")
            vanished = f"{report.vanished_fraction:.1%} of the changed weights fell back onto the base's value"
            out.print(f"rounding: at most {report.max_abs_error:.3g} a weight; {vanished}")
            if report.probe_base_loss is not None:
                losses = (report.probe_base_loss, report.probe_tuned_loss, report.probe_merged_loss)
                base, tuned, merged = (f"{loss:.4f}" for loss in losses)
                kept = "" if report.probe_gain_kept is None else f": {report.probe_gain_kept:.2%} of the gain is kept"
                out.print(f"probe, {report.probe_rows} rows: loss {base}, tuned {tuned}, merged {merged}{kept}")
            elif report.vanished_fraction > 0.1:
                out.print("--probe measures what that costs; --dtype float32 keeps more of the update")

        console.result(asdict(report), human)
