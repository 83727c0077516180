"""Resolve the options of ``prepare-data``: checks, row format, template, tokenizer, and digests of the inputs."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.encoding import Recipe
from llamatune.data.row_files import RowError, read_raw_rows
from llamatune.data.row_formats import FORMATS, ROWS_TRIED, Format, detect_format
from llamatune.data.row_json import decode_row
from llamatune.data.row_sources import source_digest
from llamatune.data.template_choice import default_template, load_template
from llamatune.data.templates import Template
from llamatune.errors import DataError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

# Raise a revision when the same inputs give other bytes. The second is for templates with a place for a row's `system`
# or `history`, which the first left out, the third for chat templates; directories prepared with others stay valid.
_REVISION, _REVISION_WITH_CONTEXT, _REVISION_OF_CHATS = 1, 2, 3


def resolve_options(options: PrepareOptions, on_event: OnEvent) -> tuple[Recipe, dict[str, Any]]:
    """Load the tokenizer and the template, detect the format, and digest the input files.

    Returns the recipe of encoding, and everything that determines the bytes of the output (the manifest's inputs).
    """
    tokenizer = load_tokenizer(options.tokenizer, on_event)
    row_format = _format_of(options)
    template = _template_for(row_format, options, tokenizer, on_event)
    is_chat = isinstance(template, ChatTemplate)
    gsm8k = row_format.name == "gsm8k"
    if options.gsm8k_annotations == "strip" and not gsm8k:
        on_event(Notice(f"--gsm8k-annotations strip has no effect on {row_format.name} rows", "warning"))
    last_only = not is_chat or options.train_on == "last-assistant"
    if row_format.name == "chat" and not is_chat and options.train_on == "all-assistant":
        what = f"template {template.name!r} does not end the assistant's earlier turns, so they cannot be trained"
        raise SpecError(what, None, "choose a chat template, or --train-on last-assistant")
    if options.train_on is not None and row_format.name != "chat" and not is_chat:
        on_event(Notice(f"--train-on has no effect on {row_format.name} rows", "warning"))
    recipe = Recipe(tokenizer, template, row_format.name, options, last_only)
    if recipe.chats is not None and recipe.chats.ends_untrained:
        what = "its generation blocks leave out the token that ends a turn, so a tuned model will not learn to stop"
        on_event(Notice(f"template {template.name!r}: {what}", "warning"))
    # Paths and --skip-bad-rows are left out: they do not change the output.
    inputs = {
        "revision": _revision_of(template),
        "rows": [source_digest(path) for path in options.rows],
        "validation": [source_digest(path) for path in options.validation],
        "tokenizer": tokenizer.fingerprint,
        "format": row_format.name,
        # Another day is no reason to prepare the same rows again.
        "template": {name: value for name, value in template.to_dict().items() if name != "now"},
        "max_seq_length": options.max_seq_length,
        "overlong": options.overlong,
        "validation_fraction": options.validation_fraction or None,
        "seed": options.seed if options.validation_fraction else None,
        "limit": options.limit,
        "train_on_prompt": options.train_on_prompt,
        "gsm8k_annotations": options.gsm8k_annotations if gsm8k else None,
    }
    if is_chat:
        inputs["train_on"] = train_on(recipe)
    return recipe, inputs


def train_on(recipe: Recipe) -> str:
    """The value of ``--train-on`` that holds."""
    return "last-assistant" if recipe.last_only else "all-assistant"


def _revision_of(template: Template | ChatTemplate) -> int:
    if isinstance(template, ChatTemplate):
        return _REVISION_OF_CHATS
    return _REVISION_WITH_CONTEXT if template.turn or "system" in template.placeholders else _REVISION


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


def _template_for(
    row_format: Format, options: PrepareOptions, tokenizer: Tokenizer, on_event: OnEvent
) -> Template | ChatTemplate:
    if options.template is None:
        template = default_template(row_format.name, tokenizer, on_event)
        if isinstance(template, ChatTemplate) and not template.is_built_in:
            on_event(Notice(f"chats are put in the model's own template, of {template.where}"))
    else:
        template = load_template(options.template, tokenizer, on_event)
    if isinstance(template, ChatTemplate):
        if not row_format.prompt_fields:
            what = f"template {template.name!r} is for conversations, and {row_format.name} rows have no turns"
            raise SpecError(what, None, "leave --template out")
        return template
    lacking = sorted(template.placeholders - set(row_format.prompt_fields))
    if lacking:
        has = ", ".join(row_format.prompt_fields) or "none"
        what = f"template {template.name!r} needs {{{lacking[0]}}}, which {row_format.name} rows lack"
        raise SpecError(what, None, f"their fields: {has}")
    if row_format.prompt_fields and not template.placeholders:
        on_event(Notice(f"template {template.name!r} contains nothing of the row's prompt", "warning"))
    return template
