"""``llamatune prepare-data``: the command line of data preparation, its report and its preview."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.data.prepare_report import PrepareReport
    from llamatune.data.preview import PreviewRow


def prepare_data(
    # readable=False: typer would report a missing permission as a usage error (2), but it is exit code 5.
    rows: Annotated[
        list[Path],
        typer.Argument(metavar="ROWS...", help="JSON Lines files or JSON lists of rows.", readable=False),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer", help="A SentencePiece tokenizer.model, or a directory that contains one.", readable=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="The directory to create.", readable=False)],
    format_name: Annotated[
        str, typer.Option("--format", metavar="NAME", help="auto, alpaca, gsm8k, chat, completion or text.")
    ] = "auto",
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME|FILE",
            help="alpaca, gsm8k, llama2-chat, completion, text, or a YAML file with `prompt`.",
            show_default="by format",
        ),
    ] = None,
    max_seq_length: Annotated[
        int, typer.Option("--max-seq-length", help="The most tokens of a row, BOS and EOS included.")
    ] = 512,
    overlong: Annotated[
        str, typer.Option("--overlong", metavar="POLICY", help="For longer rows: truncate, drop or error.")
    ] = "truncate",
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            "--validation-fraction",
            metavar="F",
            help="Hold out about this fraction of the rows; 0: none.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            "--validation",
            metavar="ROWS",
            help="A file of validation rows. Repeatable.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Read only the first N rows.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the held-out rows.")] = 0,
    train_on_prompt: Annotated[
        bool, typer.Option("--train-on-prompt", help="Train on prompt tokens too, not only on the completion.")
    ] = False,
    skip_bad_rows: Annotated[
        int, typer.Option("--skip-bad-rows", metavar="N", help="Leave out up to N unusable rows; one more is an error.")
    ] = 0,
    gsm8k_annotations: Annotated[
        str,
        typer.Option(
            "--gsm8k-annotations", metavar="POLICY", help="Calculator annotations such as <<48/2=24>>: keep or strip."
        ),
    ] = "keep",
    preview: Annotated[
        int, typer.Option("--preview", metavar="N", help="Show the tokens of the first N training rows.")
    ] = 0,
    show_ids: Annotated[bool, typer.Option("--show-ids", help="Show token ids in the preview too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Turn instruction rows into token ids and loss masks for training."""
    from llamatune.commands._console import Console

    with Console(json_mode, writes=True) as console:  # signals are handled from here on
        from llamatune.data.prepare import prepare_data as run_preparation
        from llamatune.data.prepare_options import PrepareOptions
        from llamatune.data.preview import preview_rows
        from llamatune.errors import Stopped
        from llamatune.tokenizers.sentencepiece import load_tokenizer

        options = PrepareOptions(
            rows=rows,
            tokenizer=tokenizer,
            output=output,
            format=format_name,
            template=template,
            max_seq_length=max_seq_length,
            overlong=overlong,
            validation_fraction=validation_fraction,
            validation=validation or None,
            limit=limit,
            seed=seed,
            train_on_prompt=train_on_prompt,
            skip_bad_rows=skip_bad_rows,
            gsm8k_annotations=gsm8k_annotations,
            preview=preview,
            overwrite=overwrite,
        )
        if console.should_stop():
            raise Stopped("stopped before any row was read", output, "run the same command again")
        report = run_preparation(options, console.on_event, console.should_stop)
        shown = preview_rows(output, load_tokenizer(tokenizer), preview) if preview else []
        payload = report.to_dict()
        if preview:
            payload["preview"] = [_row_payload(row) for row in shown]

        def human(out: RichConsole) -> None:
            for row in shown:
                _print_row(out, row, show_ids)
            _print_report(out, report)

        console.result(payload, human)


def _row_payload(row: PreviewRow) -> dict[str, Any]:
    return {
        "row": row.row,
        "tokens": [{"id": token.id, "piece": token.piece, "trained": token.trained} for token in row.tokens],
    }


def _print_row(out: RichConsole, row: PreviewRow, show_ids: bool) -> None:
    """Print trained tokens in green and others dim; without colours trained spans are in ``[[ ]]``."""
    from rich.text import Text

    from llamatune.errors import printable

    line = Text(f"row {row.row}: ", style="bold")
    coloured = out.is_terminal and not out.no_color
    inside = False
    for number, token in enumerate(row.tokens):
        if not coloured and token.trained != inside:
            line.append(" [[" if token.trained else "]] ")
            inside = token.trained
        shown = printable(token.piece) + (f"({token.id})" if show_ids else "")
        separator = " " if number and show_ids else ""
        line.append(separator + shown, style="green" if token.trained else "dim")
    if inside:
        line.append("]]")
    out.print(line, soft_wrap=True)


def _print_report(out: RichConsole, report: PrepareReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from llamatune.data.rows import shown_place
    from llamatune.errors import printable

    def reasons(counts: dict[str, int]) -> str:
        return "" if not counts else " (" + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) + ")"

    table = Table(title=f"{report.format} rows, template {printable(report.template['name'])}", show_header=False)
    table.title_justify = "left"
    table.add_column(style="bold")
    table.add_column()

    def add(name: str, value: str) -> None:
        table.add_row(name, Text(printable(value)))

    add("rows read", f"{report.rows_in:,}")
    add("kept", f"{report.kept:,}")
    add("truncated", f"{report.truncated:,} rows, {report.truncated_tokens:,} tokens (at {report.max_seq_length:,})")
    add("dropped", f"{report.dropped:,}{reasons(report.dropped_reasons)}")
    add("refused", f"{report.refused:,}{reasons(report.refused_reasons)}")
    add("duplicates", f"{report.duplicates:,}")
    if report.prompts_not_prefix:
        add(
            "prompts not a prefix",
            f"{report.prompts_not_prefix:,} (encoded alone they have other tokens than in their row)",
        )
    if report.ignored_keys:
        add("ignored keys", ", ".join(f"{key} ({n:,})" for key, n in report.ignored_keys.items()))
    for name, split in report.splits.items():
        share = split["target_tokens"] / split["tokens"] if split["tokens"] else 0.0
        add(
            name,
            f"{split['rows']:,} rows, {split['tokens']:,} tokens, {split['target_tokens']:,} of them targets "
            f"({share:.0%}), longest row {split['longest_row_tokens']:,}",
        )
    longest = ", ".join(
        f"{row['tokens']:,} ({shown_place(row['file'], row['line'], row.get('row'))})"
        for row in report.longest_rows[:3]
    )
    add("longest before truncation", longest)
    out.print(table)
    note = "already prepared, left as it is: " if report.unchanged else "written to "
    out.print(note + printable(report.output), markup=False)
