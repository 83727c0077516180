"""Options as the command that a user would type: read again by the command line they are the same options."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from llamatune.cli import build_app
from llamatune.command_options.command_line import command_line
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.command_options.option import Options, option_fields
from llamatune.command_options.preparation import PrepareOptions
from llamatune.command_options.training import ReportOptions, TrainOptions

VERBS = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
ODD = Path("a folder/it's $x; #1")


def read_again(line: str, kind: type[Options]) -> Options:
    program, verb, *words = shlex.split(line)
    assert program == "llamatune"
    values: dict[str, Any] = VERBS[verb].make_context(verb, words).params
    declared = {option.name: values[option.name] for option in option_fields(kind)}
    return kind(**{name: value for name, value in declared.items() if value not in (None, [])})


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        ("train", TrainOptions(Path("run.yaml")), "llamatune train run.yaml"),
        (
            "train",
            TrainOptions(Path("run.yaml"), ["lora.r=2", "training.seed=3"], resume="never"),
            "llamatune train run.yaml lora.r=2 training.seed=3 --resume never",
        ),
        (
            "prepare-data",
            PrepareOptions([Path("one"), Path("two")], tokenizer=Path("t"), output=Path("made"), limit=3),
            "llamatune prepare-data one two --tokenizer t --output made --limit 3",
        ),
        (
            "report",
            ReportOptions([Path("run")], Path("page"), prompt=["What?", "Why?"], overwrite=True),
            "llamatune report run --output page --prompt 'What?' --prompt 'Why?' --overwrite",
        ),
        (
            "generate",
            GenerateOptions(model=Path("m"), adapter=[Path("a"), Path("b")], compare=True, temperature=0, prompt=["x"]),
            "llamatune generate --model m --adapter a --adapter b --compare --prompt x --temperature 0",
        ),
        ("merge-lora", MergeOptions(Path("m"), [Path("a")], Path("o")), None),
    ],
)
def test_the_line_is_what_a_user_types(verb: str, options: Options, expected: str | None) -> None:
    line = command_line(verb, options)
    assert expected is None or line == expected
    assert read_again(line, type(options)) == options


def test_what_a_shell_would_read_otherwise_is_quoted() -> None:
    line = command_line("prepare-data", PrepareOptions([Path("rows")], tokenizer=Path("t"), output=ODD))
    assert shlex.split(line)[-1] == str(ODD)


def test_a_text_that_is_not_known_is_no_guess() -> None:
    with pytest.raises(AssertionError, match="--weights"):
        command_line("generate", GenerateOptions(model=Path("m"), adapter=[Path("a")], weights=(0.5,), prompt=["x"]))
