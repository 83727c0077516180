"""Resolve the options of ``prepare-data``: checks, row format, template, tokenizer, and digests of the inputs."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.command_options.row_input import row_input
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.column_maps import ColumnMap, advice_for, parse_map
from llamatune.data.encoding import Recipe
from llamatune.data.raw_row import RowError
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import FORMATS, ROWS_TRIED, Format, check_format, detect_format
from llamatune.data.row_json import decode_row
from llamatune.data.row_sources import source_digest
from llamatune.data.template_choice import default_template, load_template
from llamatune.data.templates import Template
from llamatune.errors import DataError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.formats.prepared import has_prompts
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

# Raise a revision when the same inputs give other bytes. The second is for templates with a place for a row's `system`
# or `history`, which the first left out, the third for chat templates; directories prepared with others stay valid.
_REVISION, _REVISION_WITH_CONTEXT, _REVISION_OF_CHATS = 1, 2, 3


@dataclass(frozen=True)
class Source:
    """A file of rows and how it is encoded; ``weight`` as in ``RowInput``."""

    path: Path
    recipe: Recipe
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What is prepared, and everything that determines the bytes of the output (the manifest's inputs)."""

    options: PrepareOptions
    train: list[Source]
    validation: list[Source]
    inputs: dict[str, Any]

    @property
    def recipes(self) -> list[Recipe]:
        """One for each format, in the order of the files."""
        return list({source.recipe.format: source.recipe for source in (*self.train, *self.validation)}.values())

    @property
    def recipe(self) -> Recipe:
        """The first whose template makes prompts."""
        recipes = self.recipes
        return next((recipe for recipe in recipes if has_prompts(recipe.template.to_dict())), recipes[0])


def resolve_options(options: PrepareOptions, on_event: OnEvent) -> Plan:
    """Load the tokenizer and the templates, detect the format of each file, and digest the input files."""
    tokenizer = load_tokenizer(options.tokenizer, on_event, "--tokenizer")
    inputs = list(map(row_input, options.rows))
    formats = _formats_of(options)
    names = list(dict.fromkeys(row_format.name for row_format in formats.values()))
    recipes = {
        row_format.name: _recipe_for(row_format, options, tokenizer, on_event, alone=len(names) == 1)
        for row_format in formats.values()
    }
    if options.gsm8k_annotations == "strip" and "gsm8k" not in names:
        on_event(Notice(f"--gsm8k-annotations strip has no effect on {' and '.join(names)} rows", "warning"))
    has_chats = any(name == "chat" or recipe.chats is not None for name, recipe in recipes.items())
    if options.train_on is not None and not has_chats:
        on_event(Notice(f"--train-on has no effect on {' and '.join(names)} rows", "warning"))
    if options.overlong == "split":
        _check_windows(options, formats, tokenizer)
    train = [Source(given.path, recipes[formats[given.path].name], given.weight) for given in inputs]
    validation = [Source(path, recipes[formats[path].name]) for path in options.validation]
    plan = Plan(options, train, validation, _determining(options, train, validation))
    if len(recipes) > 1:
        said = [f"{source.recipe.format} ({source.path.name})" for source in (*train, *validation)]
        of = f"generate uses the template {plan.recipe.template.name!r} by default"
        on_event(Notice(f"rows of several formats: {', '.join(said)}; {of}"))
    return plan


def _determining(options: PrepareOptions, train: Sequence[Source], validation: Sequence[Source]) -> dict[str, Any]:
    """Everything that determines the bytes of the output. Paths and --skip-bad-rows are left out: they do not."""
    recipes = {source.recipe.format: source.recipe for source in (*train, *validation)}
    recipe, names = next(iter(recipes.values())), list(recipes)
    weights = [source.weight for source in train]
    chats = [found for found in recipes.values() if found.chats is not None]
    inputs: dict[str, Any] = {
        "revision": max(_revision_of(found.template) for found in recipes.values()),
        "rows": [source_digest(source.path) for source in train],
        "validation": [source_digest(source.path) for source in validation],
        "tokenizer": recipe.tokenizer.fingerprint,
        "format": names[0] if len(names) == 1 else names,
        "template": _without_day(recipe.template) if len(names) == 1 else None,
        "max_seq_length": options.max_seq_length,
        "overlong": options.overlong,
        "validation_fraction": options.validation_fraction or None,
        "seed": options.seed if options.validation_fraction or any(weight % 1 for weight in weights) else None,
        "limit": options.limit,
        "train_on_prompt": options.train_on_prompt,
        "gsm8k_annotations": options.gsm8k_annotations if "gsm8k" in names else None,
    }
    # Only where they are used, so that a directory of an earlier version is still known by its inputs.
    if len(names) > 1:
        inputs["templates"] = {name: _without_day(found.template) for name, found in recipes.items()}
        inputs["formats"] = [source.recipe.format for source in (*train, *validation)]
    if chats:
        inputs["train_on"] = train_on(chats[0])
    if recipe.columns is not None:
        inputs["map"] = recipe.columns.shown
    if any(weight != 1 for weight in weights):
        inputs["weights"] = weights
    if options.overlong == "split":
        inputs["stride"] = options.stride
    return inputs


def _without_day(template: Template | ChatTemplate) -> dict[str, Any]:
    """Another day is no reason to prepare the same rows again."""
    return {name: value for name, value in template.to_dict().items() if name != "now"}


def _recipe_for(
    row_format: Format, options: PrepareOptions, tokenizer: Tokenizer, on_event: OnEvent, alone: bool
) -> Recipe:
    """``alone``: there are no rows of other formats. Beside others, text rows leave ``--template`` to these."""
    template = _template_for(row_format, options, tokenizer, on_event, alone)
    is_chat = isinstance(template, ChatTemplate)
    last_only = not is_chat or options.train_on == "last-assistant"
    if row_format.name == "chat" and not is_chat and options.train_on == "all-assistant":
        what = f"template {template.name!r} does not end the assistant's earlier turns, so they cannot be trained"
        raise SpecError(what, None, "choose a chat template, or --train-on last-assistant")
    recipe = Recipe(tokenizer, template, row_format.name, options, last_only)
    if recipe.chats is not None and recipe.chats.ends_untrained:
        what = "its generation blocks leave out the token that ends a turn, so a tuned model will not learn to stop"
        on_event(Notice(f"template {template.name!r}: {what}", "warning"))
    return recipe


def _check_windows(options: PrepareOptions, formats: Mapping[Path, Format], tokenizer: Tokenizer) -> None:
    """Raise ``SpecError`` if rows are no texts, or if a window would have no room."""
    for path, row_format in formats.items():
        if row_format.name != "text":
            what = f"--overlong split is for text rows, and these are {row_format.name} rows"
            raise SpecError(
                what, path, "choose truncate, drop or error, or prepare text rows alone (data.train takes both)"
            )
    room = options.max_seq_length - len(tokenizer.beginning)
    if room < 2:
        raise SpecError("--max-seq-length has no room for windows", None, f"raise it above {options.max_seq_length}")
    if options.stride >= room:
        what = f"--stride is {options.stride}, and a window of --max-seq-length has {room} tokens of the text"
        raise SpecError(what, None, f"it must be below {room}")


def train_on(recipe: Recipe) -> str:
    """The value of ``--train-on`` that holds."""
    return "last-assistant" if recipe.last_only else "all-assistant"


def _revision_of(template: Template | ChatTemplate) -> int:
    if isinstance(template, ChatTemplate):
        return _REVISION_OF_CHATS
    return _REVISION_WITH_CONTEXT if template.turn or "system" in template.placeholders else _REVISION


def check_options(options: PrepareOptions) -> None:
    """Raise ``SpecError`` for an unknown format, and for an output that would replace an input."""
    check_format(options.format)
    if options.column_map is not None:
        parse_map(options.column_map)
    output = Path(os.path.realpath(options.output))
    for path in options.validation:
        if row_input(path).path != path:
            raise SpecError("validation rows have no weight", path, f"write --validation {row_input(path).path}")
    for path in [*input_files(options), options.tokenizer]:
        if Path(os.path.realpath(path)).is_relative_to(output):
            raise SpecError("the output directory contains an input", path, "choose another --output")


def input_files(options: PrepareOptions) -> list[Path]:
    """Every row file, in reading order."""
    return [*(row_input(path).path for path in options.rows), *options.validation]


def _formats_of(options: PrepareOptions) -> dict[Path, Format]:
    """The format of each file. One that has no usable row is taken for one of the first other's."""
    paths = input_files(options)
    if options.format != "auto":
        return dict.fromkeys(paths, FORMATS[options.format])
    columns = None if options.column_map is None else parse_map(options.column_map)
    detected = {path: detect_format(read_raw_rows(path), path, columns) for path in paths}
    known = next((row_format for row_format in detected.values() if row_format is not None), None)
    if known is None:
        for path in detected:
            if row := _first_object(path):
                if columns is not None:
                    _check_columns(columns, row, path)
                keys = list(row)
                shown = ", ".join(map(repr, keys[:10]))
                todo = advice_for(keys) or "name the columns, such as --map instruction=COLUMN,output=COLUMN"
                todo += f"; known: {', '.join(FORMATS)} (--format)"
                raise DataError(f"rows of no known format, with {shown}", path, todo)
        known = FORMATS["text"]  # no row, or none that can be read: reading will report each
    return {path: row_format or known for path, row_format in detected.items()}


def _first_object(path: Path) -> dict[str, Any]:
    for raw in itertools.islice(read_raw_rows(path), ROWS_TRIED):
        with contextlib.suppress(RowError):
            return decode_row(raw) or {"no keys": None}
    return {}


def _check_columns(columns: ColumnMap, row: dict[str, Any], path: Path) -> None:
    try:
        columns.apply(row)
    except RowError as fault:
        raise DataError(fault.message, path) from None


def _template_for(
    row_format: Format, options: PrepareOptions, tokenizer: Tokenizer, on_event: OnEvent, alone: bool
) -> Template | ChatTemplate:
    if options.template is None or not (alone or row_format.prompt_fields):
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
