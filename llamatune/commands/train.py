"""``llamatune train``: a run spec in, a run directory out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llamatune.command_options.training import TrainOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect
from llamatune.errors import printable
from llamatune.launch_variables import Launch


def train(options: TrainOptions, console: Console, launch: Launch) -> None:
    """Fine-tune a model as a run spec says; run it again to continue."""
    began_s = time.monotonic()  # of training.max_time, before torch is loaded

    from llamatune.requests import train_and_track
    from llamatune.spec import known_fields, load_spec

    changes = known_fields(options.allow_spec_change, "--allow-spec-change")
    spec = load_spec(options.spec_path, options.overrides)
    console.log_every_steps = spec.training.log_every_steps
    timeout_s = spec.training.rank_timeout_s
    with console, connect(launch, spec.training.device, timeout_s, console.should_stop) as ranks:
        if options.dry_run:
            from llamatune.training.train import plan_training

            how = {"overwrite": options.overwrite, "force_base": options.force_base}
            plan = plan_training(spec, **how, on_event=console.on_event, ranks=ranks)
            console.result(plan, lambda out: _print_plan(out, plan, spec.to_yaml()))
            return
        summary = train_and_track(
            spec,
            options.resume == "auto",
            options.overwrite,
            options.force_base,
            changes,
            console.on_event,
            console.should_stop,
            ranks,
            began_s,
        )
        console.result(summary, lambda out: _print_summary(out, summary, spec.training.output_dir))


def _print_plan(out: RichConsole, plan: dict[str, Any], resolved: str) -> None:
    from llamatune.commands.plan_memory import print_memory_plan

    out.print(resolved)
    for key, value in plan.items():
        if key == "memory_plan":
            print_memory_plan(out, value)
        else:
            out.print(f"{key}: {value:,}" if isinstance(value, int) else printable(f"{key}: {value}"))


def _print_summary(out: RichConsole, summary: dict[str, Any], output_dir: str) -> None:
    """Fields that an early version did not record are left out."""
    from rich.table import Column, Table

    from llamatune.units import duration, energy, gibibytes, perplexity_text

    reserved = summary.get("peak_reserved_bytes")
    held = "resident" if reserved is None else f"allocated, {gibibytes(reserved)} reserved"
    columns = (Column(style="bold"), Column(justify="right"))
    table = Table(*columns, title="training", show_header=False, title_justify="left")
    table.add_row("steps", f"{summary['steps']:,}" + (", stopped early" if summary.get("stopped_early") else ""))
    table.add_row("runtime", duration(summary["runtime_s"]))
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    place = "" if summary.get("device") is None else f", {summary['device']}"
    table.add_row(f"peak memory{place}", f"{gibibytes(summary['peak_memory_bytes'])} {held}")
    if summary.get("energy_j") is not None:
        power_w = summary.get("mean_power_w")
        power = "" if power_w is None else f", {power_w:,.0f} W on average"
        table.add_row("energy", f"{energy(summary['energy_j'])}{power}")
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    table.add_row("trainable parameters", f"{trainable:,} ({100 * trainable / total:.2f} %)")
    if summary.get("start_eval_loss") is not None:
        table.add_row("validation loss before training", f"{summary['start_eval_loss']:.4f}")
    if summary["best_eval_loss"] is not None:
        step = "" if summary.get("best_step") is None else f" (step {summary['best_step']})"
        table.add_row("best validation loss", f"{summary['best_eval_loss']:.4f}{step}")
    out.print(table)
    measures: dict[str, tuple[str, Callable[[Any], str]]] = {
        "epoch": ("epoch", str),
        "train_loss": ("train\nloss", "{:.4f}".format),
        "train_perplexity": ("train\nperplexity", perplexity_text),
        "validation_loss": ("validation\nloss", "{:.4f}".format),
        "validation_perplexity": ("validation\nperplexity", perplexity_text),
        "epoch_s": ("time", duration),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    }
    headings = (Column(heading, justify="right") for heading, _ in measures.values())
    epochs = Table(*headings, title="per epoch", title_justify="left")
    for epoch in summary["epochs"]:
        epochs.add_row(*("" if epoch[key] is None else show(epoch[key]) for key, (_, show) in measures.items()))
    out.print(epochs)
    out.print(f"written to {printable(output_dir)}")
