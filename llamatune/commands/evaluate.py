"""``llamatune evaluate``: loss and token accuracy on prepared rows, or GSM8K accuracy."""

from __future__ import annotations

from typing import Any

from llamatune.command_options.inference import EvaluateOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect
from llamatune.commands._text_tables import print_notes, print_table
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
    from llamatune.reporting.evidence_tables import evaluation_table

    table = evaluation_table(payload)
    print_table(out, table)
    print_notes(out, table.notes)
