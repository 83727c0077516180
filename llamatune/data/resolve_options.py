"""Resolve the options of ``prepare-data``: checks, row format, template, tokenizer, and digests of the inputs."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.encoding import Recipe
from llamatune.data.row_files import RowError, read_raw_rows
from llamatune.data.row_formats import FORMATS, ROWS_TRIED, Format, detect_format
from llamatune.data.row_json import decode_row
from llamatune.data.templates import DEFAULT_TEMPLATES, Template, load_template
from llamatune.errors import DataError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.safe_reading import digest_file
from llamatune.tokenizers.loading import load_tokenizer

# Raise a revision when the same inputs give other bytes. The second is for templates with a place for a row's `system`
# or `history`, which the first left out; directories prepared with other templates stay valid.
_REVISION, _REVISION_WITH_CONTEXT = 1, 2


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
    recipe = Recipe(tokenizer, template, row_format.name, options)
    # Paths and --skip-bad-rows are left out: they do not change the output.
    inputs = {
        "revision": _REVISION_WITH_CONTEXT if template.turn or "system" in template.placeholders else _REVISION,
        "rows": [digest_file(path, DataError) for path in options.rows],
        "validation": [digest_file(path, DataError) for path in options.validation],
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
    """Raise ``SpecError`` for an unknown format, and for an output that would replace an input."""
    known = ("auto", *FORMATS)
    if options.format not in known:
        raise SpecError(f"--format is {options.format!r}", None, f"known: {', '.join(known)}")
    output = Path(os.path.realpath(options.output))
    for path in [*input_files(options), options.tokenizer]:
        if Path(os.path.realpath(path)).is_relative_to(output):
            raise SpecError("the output directory contains an input", path, "choose another --output")


def input_files(options: PrepareOptions) -> list[Path]:
    """Every row file, in reading order."""
    return [*options.rows, *options.validation]


def _format_of(options: PrepareOptions) -> Format:
    if options.format != "auto":
        return FORMATS[options.format]
    detected = {path: detect_format(read_raw_rows(path)) for path in input_files(options)}
    known = [(path, row_format) for path, row_format in detected.items() if row_format is not None]
    for (earlier, first), (path, other) in itertools.pairwise(known):
        if other is not first:
            what = f"{other.name} rows, but {earlier} has {first.name} rows"
            raise DataError(what, path, "prepare them separately")
    if known:
        return known[0][1]
    for path in detected:
        if keys := _keys_of_first_object(path):
            shown = ", ".join(map(repr, keys[:10]))
            raise DataError(f"rows of no known format, with {shown}", path, f"known: {', '.join(FORMATS)} (--format)")
    return FORMATS["text"]  # no row, or none that can be read: reading will report each


def _keys_of_first_object(path: Path) -> list[str]:
    for raw in itertools.islice(read_raw_rows(path), ROWS_TRIED):
        with contextlib.suppress(RowError):
            return list(decode_row(raw)) or ["no keys"]
    return []


def _template_for(row_format: Format, options: PrepareOptions, on_event: OnEvent) -> Template:
    template = load_template(options.template or DEFAULT_TEMPLATES.get(row_format.name, row_format.name))
    lacking = sorted(template.placeholders - set(row_format.prompt_fields))
    if lacking:
        has = ", ".join(row_format.prompt_fields) or "none"
        what = f"template {template.name!r} needs {{{lacking[0]}}}, which {row_format.name} rows lack"
        raise SpecError(what, None, f"their fields: {has}")
    if row_format.prompt_fields and not template.placeholders:
        on_event(Notice(f"template {template.name!r} contains nothing of the row's prompt", "warning"))
    return template
