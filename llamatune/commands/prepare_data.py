"""``llamatune prepare-data``: the command line of data preparation, its report and its preview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable

if TYPE_CHECKING:
    from rich.text import Text


def prepare_data(options: PrepareOptions, console: Console) -> None:
    """Turn instruction rows into token ids and loss masks for training."""
    with console:  # signals are handled from here on
        from llamatune.data.prepare import prepare_data as run_preparation
        from llamatune.data.preview import preview_rows
        from llamatune.tokenizers.loading import load_tokenizer

        if console.should_stop():
            raise Stopped("stopped before any row was read", options.output, "run the same command again")
        report = run_preparation(options, console.on_event, console.should_stop)
        count = options.preview
        shown = preview_rows(options.output, load_tokenizer(options.tokenizer), count) if count else []
        payload = {**report, "preview": shown} if count else report

        def human(out: RichConsole) -> None:
            for row in shown:
                _print_row(out, row, options.show_ids)
            _print_report(out, report)

        console.result(payload, human)


def _print_row(out: RichConsole, row: Mapping[str, Any], show_ids: bool) -> None:
    """The row's fields, its text, and with ``show_ids`` its tokens with their ids."""
    from rich.text import Text

    lines = {**{name: [_piece(text)] for name, text in row["fields"].items()}, "as text": row["text"]}
    width = max(map(len, lines))
    out.print(Text(f"row {row['row']}", style="bold"))
    for name, pieces in lines.items():
        label = Text(f"  {printable(name):<{width}}  ", style="bold")
        behind = "\n" + " " * len(label.plain)
        told = [{**piece, "text": printable(piece["text"], "\n").replace("\n", behind)} for piece in pieces]
        out.print(_marked(out, label, told, name == "as text"), soft_wrap=True)
    if show_ids:
        tokens = [{**token, "text": printable(token["piece"]), "id": f"({token['id']})"} for token in row["tokens"]]
        out.print(_marked(out, Text(f"  {'tokens':<{width}}  ", style="bold"), tokens, True), soft_wrap=True)


def _piece(text: str) -> dict[str, Any]:
    return {"text": text, "trained": False, "special": False}


def _marked(out: RichConsole, line: Text, pieces: Sequence[Mapping[str, Any]], marks: bool) -> Text:
    """``pieces`` behind ``line``; with ``marks`` trained ones are green and others dim, without colours in ``[[ ]]``.

    Special tokens are in ``« »``, so that ``«</s>»`` is not the text ``</s>``.
    """
    bracketed, inside = marks and not (out.is_terminal and not out.no_color), False
    for piece in pieces:
        if bracketed and piece["trained"] != inside:
            line.append("[[" if piece["trained"] else "]]")
            inside = piece["trained"]
        text = f"«{piece['text']}»" if piece["special"] else piece["text"]
        told = f"{text}{piece['id']} " if "id" in piece else text
        line.append(told, style=("green" if piece["trained"] else "dim") if marks else "")
    return line.append("]]") if inside else line


def _print_report(out: RichConsole, report: Mapping[str, Any]) -> None:
    from rich.table import Column, Table

    from llamatune.data.raw_row import shown_place

    def reasons(counts: dict[str, int]) -> str:
        return "" if not counts else " (" + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) + ")"

    title = f"{report['format']} rows, template {printable(report['template']['name'])}"
    if "chat" in report["format"].split(", ") and report["train_on"]:
        title += f", targets: {report['train_on']}"
    table = Table(Column(style="bold"), "", title=title, title_justify="left", show_header=False)

    def add(name: str, value: str) -> None:
        table.add_row(name, printable(value))

    add("rows read", f"{report['rows_in']:,}")
    add("kept", f"{report['kept']:,}")
    truncated = f"{report['truncated']:,} rows, {report['truncated_tokens']:,} tokens"
    add("truncated", f"{truncated} (at {report['max_seq_length']:,})")
    if count := report["split_rows"]:
        windows, repeated = report["split_windows"], report["repeated_tokens"]
        add("split", f"{count:,} rows into {windows:,} windows, {repeated:,} tokens repeated as context")
    add("dropped", f"{report['dropped']:,}{reasons(report['dropped_reasons'])}")
    add("refused", f"{report['refused']:,}{reasons(report['refused_reasons'])}")
    if report["adjusted"]:
        add("adjusted", ", ".join(f"{n:,} {kind}" for kind, n in report["adjusted"].items()))
    loose = report["loose_duplicates"]
    more = f" ({loose:,} without regard to white space and case)" if loose != report["duplicates"] and loose else ""
    add("duplicates", f"{report['duplicates']:,}{more}")
    if texts := report["special_texts"]:
        add("special tokens as text", ", ".join(f"{text} ({n:,} rows)" for text, n in texts.items()))
    if count := report["moved_spaces"]:
        add("white space moved", f"{count:,} (from the end of the prompt to the beginning of the answer)")
    if count := report["forced_boundaries"]:
        add("boundaries set", f"{count:,} (encoded as a whole they have other tokens where an answer begins)")
    if count := report["prompts_not_prefix"]:
        add("prompts not a prefix", f"{count:,} (encoded alone they have other tokens than in their row)")
    if count := report["only_last"]:
        add("last answer alone", f"{count:,} (the template writes earlier answers in another way)")
    if report["ignored_keys"]:
        add("ignored keys", ", ".join(f"{key} ({n:,})" for key, n in report["ignored_keys"].items()))
    if len(files := report["files"] or []) > 1 or any(file["weight"] not in (1, None) for file in files):
        for file in files:
            weight = "" if file["weight"] in (1, None) else f", weight {file['weight']:g}"
            written = f"{file['train_rows']:,} in train, {file['validation_rows']:,} in validation"
            add(
                f"{file['format']} file",
                f"{file['file']}: {file['kept']:,} of {file['rows_in']:,} rows{weight}, {written}",
            )
    for name, split in report["splits"].items():
        tokens, targets = split["tokens"], split["target_tokens"]
        shown = f"{split['rows']:,} rows, {tokens:,} tokens, {targets:,} of them targets"
        add(name, f"{shown} ({targets / max(1, tokens):.0%}), longest row {split['longest_row_tokens']:,}")
    longest = [
        (row["tokens"], shown_place(row["file"], row.get("line"), row.get("row"))) for row in report["longest_rows"]
    ]
    add("longest before truncation", ", ".join(f"{tokens:,} ({place})" for tokens, place in longest[:3]))
    out.print(table)
    note = "already prepared, left as it is: " if report["unchanged"] else "written to "
    out.print(note + printable(report["output"]))
