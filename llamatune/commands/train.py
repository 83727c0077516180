"""``llamatune train``: a run spec in, a run directory out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llamatune.commands._console import Console
from llamatune.options.training import TrainOptions

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


def train(options: TrainOptions, console: Console) -> None:
    """Fine-tune a model as a run spec says; run it again to continue."""
    from llamatune.spec import load_spec

    spec = load_spec(options.spec_path, list(options.overrides))
    console.log_every_steps = spec.training.log_every_steps
    with console:
        from llamatune.tracking.trackers import Trackers
        from llamatune.training.run import plan_training
        from llamatune.training.run import train as run_training

        trackers = Trackers(spec, console.on_event)
        if options.dry_run:
            plan = plan_training(spec, force_base=options.force_base, on_event=console.on_event)
            console.result(plan, lambda out: _print_plan(out, plan, spec.to_yaml()))
            return
        with trackers:
            summary = run_training(
                spec,
                resume=options.resume == "auto",
                overwrite=options.overwrite,
                force_base=options.force_base,
                allowed_changes=tuple(options.allow_spec_change),
                on_event=trackers.on_event,
                should_stop=console.should_stop,
            )
        console.result(summary, lambda out: _print_summary(out, summary))


def _print_plan(out: RichConsole, plan: dict[str, Any], resolved: str) -> None:
    from llamatune.commands.plan_memory import print_memory_plan

    out.print(resolved, markup=False)
    for key, value in plan.items():
        if key == "memory_plan":
            print_memory_plan(out, value)
            continue
        out.print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}", markup=False)


def _print_summary(out: RichConsole, summary: dict[str, Any]) -> None:
    from rich.table import Table

    from llamatune.units import duration, gibibytes

    reserved = summary["peak_reserved_bytes"]
    memory = gibibytes(summary["peak_memory_bytes"])
    table = Table(title="training", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("steps", f"{summary['steps']:,}" + (", stopped early" if summary.get("stopped_early") else ""))
    table.add_row("runtime", duration(summary["runtime_s"]))
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    if reserved is None:
        table.add_row(f"peak memory, {summary['device']}", f"{memory} resident")
    else:
        table.add_row(f"peak memory, {summary['device']}", f"{memory} allocated, {gibibytes(reserved)} reserved")
    table.add_row("trainable parameters", f"{summary['trainable_parameters']:,} ({summary['trainable_percent']:.2f} %)")
    if summary["best_eval_loss"] is not None:
        table.add_row("best validation loss", f"{summary['best_eval_loss']:.4f} (step {summary['best_step']})")
    out.print(table)
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("epoch", "epoch", str),
        ("train\nloss", "train_loss", "{:.4f}".format),
        ("train\nperplexity", "train_perplexity", "{:.2f}".format),
        ("validation\nloss", "validation_loss", "{:.4f}".format),
        ("validation\nperplexity", "validation_perplexity", "{:.2f}".format),
        ("time", "epoch_s", duration),
        ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ]
    epochs = Table(title="per epoch", title_justify="left")
    for heading, _, _ in columns:
        epochs.add_column(heading, justify="right")
    for epoch in summary["epochs"]:
        epochs.add_row(*("" if epoch[key] is None else show(epoch[key]) for _, key, show in columns))
    out.print(epochs)
    out.print(f"written to {summary['output_dir']}", markup=False)
