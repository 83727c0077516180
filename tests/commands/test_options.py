"""Every option of every verb comes from one field of one frozen dataclass, which the core takes as its request."""

from __future__ import annotations

import importlib
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import typer

from llamatune.cli import VERBS, build_app
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.inference import EvaluateOptions, ModelSource, Sampling
from llamatune.command_options.option import Option, option_fields
from llamatune.commands._console import Console
from llamatune.commands._typer_options import with_options
from llamatune.errors import SpecError

NAMES = [name for names in VERBS.values() for name in names]
COMMANDS = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
OF_EVERY_VERB = {"--json"}
"""Options that no dataclass declares: they say how a result is printed, and the core does not know of them."""


def options_of(name: str) -> type | None:
    """The options class of a verb; None for one that has no options of its own."""
    module = name.replace("-", "_")
    verb = getattr(importlib.import_module(f"llamatune.commands.{module}"), module)
    first = next(iter(typing.get_type_hints(verb).values()))
    return first if option_fields(first) else None


FIELDS = [(name, field) for name in NAMES if (options := options_of(name)) for field in option_fields(options)]


def test_only_env_has_no_options_of_its_own() -> None:
    assert [name for name in NAMES if options_of(name) is None] == ["env"]


@pytest.mark.parametrize("name", NAMES)
def test_help_and_default_of_an_option_are_those_of_its_field(name: str) -> None:
    options = options_of(name)
    fields = {field.name: field for field in option_fields(options)} if options else {}
    shown = {param.name: param for param in COMMANDS[name].params if param.opts[0] not in OF_EVERY_VERB}
    assert shown.keys() == fields.keys()
    for field in fields.values():
        param = shown[field.name]
        assert param.help == field.help
        assert param.required == field.required
        if field.argument:
            assert param.param_type_name == "argument"
        else:
            assert param.opts == [field.flag]
        if not field.required:
            assert param.default == (None if field.default == () else field.default)
            if field.default is None or field.default == ():
                assert param.show_default == (field.shown_default or False)


@pytest.mark.parametrize("name", [name for name in NAMES if options_of(name)])
def test_a_verb_that_is_given_nothing_more_gets_what_the_core_gets(name: str) -> None:
    """What is parsed, turned into the dataclass, is the dataclass made by hand."""
    options = options_of(name)
    assert options is not None
    received: list[Any] = []

    def verb(options: Any, console: Console) -> None:
        received.append(options)

    verb.__annotations__ = {"options": options}
    required = [field for field in option_fields(options) if field.required]
    app = typer.Typer()
    app.command()(with_options(verb))
    words = [word for field in required for word in ((() if field.argument else (field.flag,)) + ("a",))]
    preset = ["--preset", "llama-2-7b"] if name == "count-params" else []
    typer.main.get_command(app)(args=[*words, *preset], standalone_mode=False)
    made = {field.name: [Path("a")] if typing.get_origin(field.kind) is Sequence else Path("a") for field in required}
    assert received == [options(**made, **({"preset": "llama-2-7b"} if preset else {}))]


def outside(field: Option) -> list[Any]:
    """Values that lie just beyond the bounds and choices of an option."""
    step = 1 if field.kind is int else 1e-9
    values: list[Any] = [f"no-{field.name}"] if field.choices else []
    values += [bound - step for bound in (field.at_least,) if bound is not None]
    values += [field.above] if field.above is not None else []
    values += [bound + step for bound in (field.at_most,) if bound is not None]
    values += [field.below] if field.below is not None else []
    return values


BEYOND = [
    pytest.param(name, field, value, id=f"{name} {field.flag} {value}")
    for name, field in FIELDS
    for value in outside(field)
]


@pytest.mark.parametrize(("name", "field", "value"), BEYOND)
def test_a_value_beyond_its_bounds_is_refused_before_any_file_is_read(
    command: Callable[..., Any], name: str, field: Option, value: Any
) -> None:
    words: list[Any] = [name]
    for _, other in [entry for entry in FIELDS if entry[0] == name]:
        if other.required:
            words += ["absent"] if other.argument else [other.flag, "absent"]
    extra = ["--preset", "llama-2-7b"] if name == "count-params" else []
    extra += ["--prompt", "x"] if name == "generate" else []
    task_only = name == "evaluate" and field.name in ("shots", "seed", "max_new_tokens")
    done = command(*words, *extra, *(["--task", "gsm8k"] if task_only else []), f"{field.flag}={value}")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {field.flag} is ")
    assert ": it must be " in done.stderr
    assert done.stderr.count("\n") == 1


def test_bounds_are_there_to_be_walked() -> None:
    assert len(BEYOND) > 30


def test_one_model_source_serves_the_verbs_that_compute() -> None:
    source = {field.name for field in option_fields(ModelSource)}
    for options in (GenerateOptions, EvaluateOptions):
        assert issubclass(options, ModelSource)
        assert source <= {field.name for field in option_fields(options)}
    with pytest.raises(SpecError, match="--compare needs two models"):
        ModelSource(Path("m"), compare=True)


def test_options_do_not_change_once_they_are_made() -> None:
    with pytest.raises(FrozenInstanceError):
        Sampling().seed = 1  # type: ignore[misc]


def test_not_a_number_is_in_no_bounds() -> None:
    for values in ({"temperature": float("nan")}, {"top_p": float("nan")}):
        with pytest.raises(SpecError, match="it must be"):
            Sampling(**values)


def test_help_names_arguments_by_what_they_are_and_not_by_types(command: Callable[..., Any]) -> None:
    for verb in ("train", "prepare-data", "sweep", "slurm", "explain", "judge"):
        text = command(verb, "--help").stdout
        assert not re.search(r"<(list|Path|path|str|int|float)\b", text), verb
        assert "] [[" not in text
        assert "PATH" not in text or verb == "prepare-data"  # a tokenizer is a file, or a directory that holds one
