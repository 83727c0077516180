"""``llamatune evaluate``: loss and accuracy on prepared rows, or GSM8K questions answered right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


def evaluate(
    model: Annotated[
        Path, typer.Option(help="A model directory, Meta's or Hugging Face's.", show_default=False, readable=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="A directory of prepare-data; with --task, a file of rows.", show_default=False, readable=False
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="An adapter directory to put on it.", readable=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Evaluate the base beside the tuned model.")] = False,
    task: Annotated[
        str | None, typer.Option(help="gsm8k: generate answers and score them.", show_default="loss on prepared rows")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of prepared data: train, validation or all.", show_default="validation, else train"),
    ] = None,
    per_row: Annotated[
        Path | None, typer.Option(help="Also write each prepared row's loss to this JSONL file.", readable=False)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Of zero-shot questions: a template's name or file, or none.",
            show_default="the one stored with the model, else gsm8k",
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Show N worked examples before each question.")] = None,
    shots_data: Annotated[
        Path | None, typer.Option(help="The file of rows that examples are chosen from.", readable=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which examples are shown.", show_default="0")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most of one answer.", show_default="512")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Keep each answer in this JSONL file; the same command goes on with it.", readable=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what stands at --per-row or --output.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that are computed together.")] = 16,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept an adapter of another base, or data of another tokenizer.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="same, float32, bfloat16 or float16.")] = "same",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_mode: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Measure loss and perplexity, or GSM8K accuracy."""
    from llamatune.commands._console import Console

    with Console(json_mode, writes=output is not None) as console:
        from llamatune.errors import SpecError

        of_rows = {"split": split, "per_row": per_row}
        of_tasks = {
            "template": template, "shots": shots, "shots_data": shots_data, "seed": seed,
            "max_new_tokens": max_new_tokens, "output": output,
        }  # fmt: skip
        if task not in (None, "gsm8k"):
            raise SpecError(
                f"no task is called {task!r}", "--task", "there is gsm8k; without it the data is a prepared directory"
            )
        for name, value in (of_tasks if task is None else of_rows).items():
            if value is not None:
                kind = "it needs --task gsm8k" if task is None else "it needs prepared data, without --task"
                raise SpecError(kind, f"--{name.replace('_', '-')}")
        if overwrite and per_row is None and output is None:
            raise SpecError("it needs --per-row or --output", "--overwrite")

        from llamatune.devices import choose_device
        from llamatune.durable_writing import output_file, write_atomic
        from llamatune.inference.evaluate import PreparedEvaluation, evaluate_prepared
        from llamatune.inference.evaluate_gsm8k import Gsm8kEvaluation, evaluate_gsm8k
        from llamatune.model.torch_dtypes import TORCH_DTYPES
        from llamatune.strict_json import dump_json_lines

        if dtype != "same" and dtype not in TORCH_DTYPES:
            raise SpecError(f"--dtype is same, {', '.join(TORCH_DTYPES)}, not {dtype!r}")
        of_both: dict[str, Any] = {
            "model": model, "data": data, "adapter": adapter, "compare": compare, "limit": limit,
            "batch_size": batch_size, "force_base": force_base, "dtype": TORCH_DTYPES.get(dtype),
            "device": choose_device(device, console.on_event),
        }  # fmt: skip
        if task is None:
            rows_file = None if per_row is None else output_file(per_row, overwrite)
            scored = evaluate_prepared(
                PreparedEvaluation(**of_both, split=split), console.on_event, console.should_stop
            )
            if rows_file is not None:
                write_atomic(rows_file, dump_json_lines(scored.per_row()), overwrite)
            payload = scored.to_dict()
        else:
            given: dict[str, Any] = {name: value for name, value in of_tasks.items() if value is not None}
            asked = Gsm8kEvaluation(**of_both, **given, overwrite=overwrite)
            payload = evaluate_gsm8k(asked, console.on_event, console.should_stop).to_dict()
        console.result(
            payload, lambda out: _print_table(out, payload) if out.is_terminal else _print_lines(out, payload)
        )


def _print_lines(out: RichConsole, payload: dict[str, Any]) -> None:
    """``key=value``, one a line."""
    from llamatune.errors import printable

    def text(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return ",".join(map(text, value))
        return f"{value:.6g}" if isinstance(value, float) else printable(str(value))

    for key, value in payload.items():
        out.print(f"{key}={text(value)}", markup=False)


def _print_table(out: RichConsole, payload: dict[str, Any]) -> None:
    """A line a measure, a column a model."""
    from rich.table import Table
    from rich.text import Text

    def percent(share: float) -> str:
        return f"{share:.1%}"

    measures: dict[str, tuple[str, Callable[[Any], str]]] = {
        "loss": ("loss, nats a token", "{:.4f}".format),
        "perplexity": ("perplexity", "{:.4f}".format),
        "token_accuracy": ("token accuracy", percent),
        "correct": ("right answers", "{:,}".format),
        "accuracy": ("accuracy", percent),
        "accuracy_interval": ("95 % interval", lambda bounds: " to ".join(map(percent, bounds))),
        "invalid": ("answers without a number", "{:,}".format),
        "unfinished": ("answers cut at the limit", "{:,}".format),
    }
    base = "base_loss" in payload or "base_accuracy" in payload
    columns = {"base": "base_", "tuned": ""} if base else {"": ""}
    table = Table("", *columns, title=Text(_title(payload)), title_justify="left", show_header=base)
    for name, (heading, shown) in measures.items():
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
    from llamatune.errors import printable

    data = printable(payload["data"])
    if "task" in payload:
        return f"{payload['questions']:,} questions of {data}, {payload['shots']} shots, {payload['dtype']}"
    tokens = f"{payload['target_tokens']:,} target tokens"
    return f"{payload['split']} rows of {data}: {payload['rows']:,}, {tokens}, {payload['dtype']}"
