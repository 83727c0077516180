"""``llamatune evaluate``: loss and token accuracy on prepared rows, or GSM8K accuracy."""

from __future__ import annotations

from typing import Any

from llamatune.command_options.inference import EvaluateOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect
from llamatune.errors import printable
from llamatune.launch_variables import Launch


def evaluate(options: EvaluateOptions, console: Console, launch: Launch) -> None:
    """Measure loss and perplexity, or GSM8K accuracy."""
    from llamatune.requests import evaluate_model

    with console, connect(launch, options.device, should_stop=console.should_stop) as ranks:
        payload = evaluate_model(options, console.on_event, console.should_stop, ranks)
        console.result(
            payload, lambda out: _print_table(out, payload) if out.is_terminal else _print_lines(out, payload)
        )


def _print_lines(out: RichConsole, payload: dict[str, Any]) -> None:
    """``key=value``, one a line."""

    def text(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return ",".join(map(text, value))
        return f"{value:.6g}" if isinstance(value, float) else printable(str(value))

    for key, value in payload.items():
        out.print(f"{key}={text(value)}")


def _print_table(out: RichConsole, payload: dict[str, Any]) -> None:
    """A row per measure, a column per model."""
    from rich.table import Table

    from llamatune.reporting.evidence_tables import MEASURES

    base = "base_loss" in payload or "base_accuracy" in payload
    columns = {"base": "base_", "tuned": ""} if base else {"": ""}
    table = Table("", *columns, title=_title(payload), title_justify="left", show_header=base)
    for name, (heading, shown) in MEASURES.items():
        if name in payload:
            table.add_row(heading, *(shown(payload[prefix + name]) for prefix in columns.values()))
    out.print(table)
    if "improved_rows" in payload:
        bounds = payload["loss_difference_interval"]
        sure = "" if bounds is None else f" (95 %: {bounds[0]:+.4f} to {bounds[1]:+.4f})"
        out.print(f"tuning changed the loss by {payload['loss_difference']:+.4f}{sure}")
        out.print(f"and made it smaller in {payload['improved_rows']:,} of {payload['rows']:,} rows")
    if "p_value" in payload:
        out.print(f"tuning gained {payload['gained']:,} answers and lost {payload['lost']:,}")
        out.print(f"p = {payload['p_value']:.3g} (McNemar's exact test)")


def _title(payload: dict[str, Any]) -> str:
    data = printable(payload["data"])
    if "task" in payload:
        return f"{payload['questions']:,} questions of {data}, {payload['shots']} shots, {payload['dtype']}"
    tokens = f"{payload['target_tokens']:,} target tokens"
    return f"{payload['split']} rows of {data}: {payload['rows']:,}, {tokens}, {payload['dtype']}"
