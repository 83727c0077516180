"""Options of ``prepare-data``: their checks, the row format and template they select, and the digests of the inputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.data.encoding import Recipe
from llamatune.data.row_formats import FORMATS, Format, detect_format
from llamatune.data.row_parsing import decode_row
from llamatune.data.rows import RowError, read_raw_rows
from llamatune.data.templates import DEFAULT_TEMPLATES, Template, load_template
from llamatune.errors import DataError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.files import digest_file
from llamatune.tokenizers.sentencepiece import load_tokenizer

# Raise a revision when the same inputs give other bytes. The second is for templates with a place for a row's `system`
# or `history`, which the first left out; directories prepared with other templates stay valid.
_REVISION, _REVISION_WITH_CONTEXT = 1, 2
_ROWS_TRIED = 1000


@dataclass
class PrepareOptions:
    """The options of ``prepare-data``, named as on the command line.

    Args:
        rows: JSON Lines files or JSON lists, read in this order.
        tokenizer: a ``tokenizer.model``, or a directory that contains one.
        output: the directory to create.
        format: a name of ``FORMATS``, or ``auto``: detected from each file's first usable row.
        template: a built-in name or a YAML file; None: the default of the format.
        max_seq_length: the most tokens of a row, BOS and EOS included.
        overlong: ``truncate`` on the right, ``drop`` the row, or ``error``.
        validation_fraction: hold out about this fraction of the rows; 0 and None hold out none.
        validation: files of validation rows.
        limit: read at most this many of ``rows`` (``validation`` is read whole).
        seed: selects the held-out rows.
        train_on_prompt: prompt tokens are targets too; BOS never is.
        skip_bad_rows: up to this many unusable rows are refused and counted; one more is an error.
        gsm8k_annotations: ``keep`` or ``strip`` the calculator annotations of GSM8K answers.
        preview: rows that the command line shows; no effect here.
        overwrite: replace what is at ``output``.
    """

    rows: list[Path]
    tokenizer: Path
    output: Path
    format: str = "auto"
    template: str | None = None
    max_seq_length: int = 512
    overlong: str = "truncate"
    validation_fraction: float | None = None
    validation: list[Path] | None = None
    limit: int | None = None
    seed: int = 0
    train_on_prompt: bool = False
    skip_bad_rows: int = 0
    gsm8k_annotations: str = "keep"
    preview: int = 0
    overwrite: bool = False


def resolve_options(options: PrepareOptions, on_event: OnEvent) -> tuple[Recipe, dict[str, Any]]:
    """Load the tokenizer and the template, detect the format, and digest the input files.

    Returns the recipe of encoding, and everything that determines the bytes of the output (the manifest's inputs).
    """
    tokenizer = load_tokenizer(options.tokenizer, on_event)
    row_format = _format_of(options)
    template = _template_for(row_format, options, on_event)
    gsm8k = row_format.name == "gsm8k"
    if options.gsm8k_annotations == "strip" and not gsm8k:
        on_event(Notice(f"--gsm8k-annotations strip has no effect on {row_format.name} rows", "warning"))
    recipe = Recipe(
        tokenizer,
        template,
        row_format.name,
        options.max_seq_length,
        options.overlong,
        options.train_on_prompt,
        gsm8k and options.gsm8k_annotations == "strip",
    )
    # Paths and --skip-bad-rows are left out: they do not change the output.
    inputs = {
        "revision": _REVISION_WITH_CONTEXT if template.turn or "system" in template.placeholders else _REVISION,
        "rows": [digest_file(path, DataError) for path in options.rows],
        "validation": [digest_file(path, DataError) for path in options.validation or []],
        "tokenizer": tokenizer.fingerprint,
        "format": row_format.name,
        "template": template.to_dict(),
        "max_seq_length": options.max_seq_length,
        "overlong": options.overlong,
        "validation_fraction": options.validation_fraction or None,
        "seed": options.seed if options.validation_fraction else None,
        "limit": options.limit,
        "train_on_prompt": options.train_on_prompt,
        "gsm8k_annotations": options.gsm8k_annotations if gsm8k else None,
    }
    return recipe, inputs


def check_options(options: PrepareOptions) -> None:
    """Raise ``SpecError`` for values out of bounds and options that exclude each other."""
    if not options.rows:
        raise SpecError("no row files", None, "give at least one JSON or JSONL file")
    bounds = (
        ("--max-seq-length", options.max_seq_length, 2, 1 << 30),
        ("--limit", options.limit, 1, 1 << 62),
        ("--seed", options.seed, 0, (1 << 63) - 1),
        ("--skip-bad-rows", options.skip_bad_rows, 0, 1 << 62),
        ("--preview", options.preview, 0, 1 << 30),
    )
    for name, value, least, most in bounds:
        if value is not None and not least <= value <= most:
            raise SpecError(
                f"{name} is {value}", None, f"it must be at least {least}" if value < least else "too large"
            )
    choices = (
        ("--format", options.format, ("auto", *FORMATS)),
        ("--overlong", options.overlong, ("truncate", "drop", "error")),
        ("--gsm8k-annotations", options.gsm8k_annotations, ("keep", "strip")),
    )
    for name, choice, known in choices:
        if choice not in known:
            raise SpecError(f"{name} is {choice!r}", None, f"known: {', '.join(known)}")
    fraction = options.validation_fraction
    if fraction and options.validation:
        raise SpecError("--validation-fraction and --validation exclude each other", None, "give one of them")
    if fraction is not None and not 0 <= fraction < 1:
        raise SpecError(f"--validation-fraction is {fraction}", None, "it must be at least 0 and below 1")
    output = Path(os.path.realpath(options.output))
    for path in [*input_files(options), options.tokenizer]:
        if Path(os.path.realpath(path)).is_relative_to(output):
            raise SpecError("the output directory contains an input", path, "choose another --output")


def input_files(options: PrepareOptions) -> list[Path]:
    """Every row file, in reading order."""
    return [*options.rows, *(options.validation or [])]


def _format_of(options: PrepareOptions) -> Format:
    if options.format != "auto":
        return FORMATS[options.format]
    first: tuple[Format, Path] | None = None
    for path in input_files(options):
        detected = detect_format(read_raw_rows(path))
        if detected is None:
            continue
        if first is not None and detected is not first[0]:
            what = f"{detected.name} rows, but {first[1]} has {first[0].name} rows"
            raise DataError(what, path, "prepare them separately")
        first = (detected, path)
    if first is not None:
        return first[0]
    for path in input_files(options):
        keys = _keys_of_first_object(path)
        if keys:
            shown = ", ".join(map(repr, keys[:10]))
            raise DataError(f"rows of no known format, with {shown}", path, f"known: {', '.join(FORMATS)} (--format)")
    return FORMATS["text"]  # no row, or none that can be read: reading will report each


def _keys_of_first_object(path: Path) -> list[str]:
    for number, raw in enumerate(read_raw_rows(path)):
        if number == _ROWS_TRIED:
            break
        try:
            return list(decode_row(raw)) or ["no keys"]
        except RowError:
            continue
    return []


def _template_for(row_format: Format, options: PrepareOptions, on_event: OnEvent) -> Template:
    template = load_template(options.template or DEFAULT_TEMPLATES[row_format.name])
    lacking = sorted(template.placeholders - set(row_format.prompt_fields))
    if lacking:
        has = ", ".join(row_format.prompt_fields) or "none"
        raise SpecError(
            f"template {template.name!r} needs {{{lacking[0]}}}, which {row_format.name} rows lack",
            None,
            f"their fields: {has}",
        )
    if row_format.prompt_fields and not template.placeholders:
        on_event(Notice(f"template {template.name!r} contains nothing of the row's prompt", "warning"))
    return template
