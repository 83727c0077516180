"""What a verb's options say it writes, checked before it begins: see ``output_files`` for the rule."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.option import Option, Options, option_fields
from llamatune.command_options.row_input import row_input
from llamatune.durable_writing import refuse_occupied
from llamatune.errors import EnvironmentFault, SpecError
from llamatune.formats.manifest import has_manifest
from llamatune.output_files import (
    descriptor_of,
    is_stream,
    output_file,
    refuse_inside,
    refuse_replacing,
    refuse_unwritable,
)


@dataclass(frozen=True)
class Output:
    """An output that was given: by which option, where, and what is written there (``Option.writes``)."""

    flag: str
    path: Path
    kind: str


def outputs_of(options: Options) -> list[Output]:
    """Every output that was given, in the order of the options."""
    outputs = []
    for declared in option_fields(type(options)):
        path = getattr(options, declared.name)
        if declared.writes and path is not None:
            kind = declared.writes if isinstance(declared.writes, str) else declared.writes(path)
            outputs.append(Output(declared.flag, path, kind))
    return outputs


def check_outputs(options: Options) -> bool:
    """Whether an output is stdout, which then has no room for the result.

    Raises:
        SpecError: an output is an input, holds one or is inside of one; two outputs are one.
        EnvironmentFault: it exists, or cannot be written.
    """
    overwrite = getattr(options, "overwrite", False)
    outputs = outputs_of(options)
    for one, other in itertools.combinations(outputs, 2):
        if _are_one(one.path, other.path):
            what = f"{one.flag} and {other.flag} name the same file"
            raise SpecError(what, one.path, "give each a name of its own")
        refuse_inside(one.path, [(other.flag, other.path)], one.flag)
        refuse_inside(other.path, [(one.flag, one.path)], other.flag)
        refuse_replacing(one.path, [(other.flag, other.path)], one.flag)
    declared = option_fields(type(options))
    inputs = [given for option in declared for given in _inputs_of(option, options)]
    closed = [given for option in declared if not option.holds_outputs for given in _inputs_of(option, options)]
    for output in outputs:
        refuse_replacing(output.path, inputs, output.flag, keeps=output.kind == "run" and not overwrite)
        refuse_inside(output.path, closed, output.flag)
        _check(output, overwrite)
    return any(descriptor_of(output.path) == 1 for output in outputs)


def _are_one(path: Path, other: Path) -> bool:
    if is_stream(path):
        return descriptor_of(path) is not None and descriptor_of(path) == descriptor_of(other)
    return os.path.realpath(path) == os.path.realpath(other)


def _inputs_of(option: Option, options: Options) -> Iterator[tuple[str, Path]]:
    """What is read because of an option, with its name. A value may also be a name that is no path."""
    value = getattr(options, option.name)
    if option.name == "template" and value is not None:
        value = Path(value)
    for path in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(path, Path) or option.writes:
            continue
        if option.weighted:
            path = row_input(path).path
        if path.exists() and not is_stream(path):
            yield option.metavar.rstrip(".") if option.argument and option.metavar else option.flag, path


def _check(output: Output, overwrite: bool) -> None:
    if output.kind in ("file", "answers"):
        output_file(output.path, overwrite or output.kind == "answers")
        return
    refuse_unwritable(Path(os.path.realpath(output.path)).parent if output.kind == "product" else output.path)
    if output.kind == "product":
        if not has_manifest(output.path):
            refuse_occupied(output.path, overwrite)
        if overwrite:
            _refuse_losing(output)


def _refuse_losing(output: Output) -> None:
    """Raise where ``--overwrite`` would remove a directory that nobody means."""
    made = Path(os.path.realpath(output.path))
    for name, place in (("the current directory", "."), ("your home directory", os.path.expanduser("~"))):
        if made == (real := Path(os.path.realpath(place))) or made in real.parents:
            raise EnvironmentFault(f"--overwrite would remove {name}", output.path, "choose another output")
