"""Types of the run spec's fields: paths, counts, epochs, fractions, target modules, recompute modes, sizes, times."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationInfo, WithJsonSchema

from llamatune.errors import SpecError
from llamatune.path_expansion import expand_path
from llamatune.shapes.adapter import WHOLE_MODULES
from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.shapes.recompute_levels import MODES, is_mode
from llamatune.units import parse_duration, parse_size

_DEVICE = r"auto|cpu|cuda(:\d+)?"
STORED = "stored"
"""In the context of a validation: the spec is a run's own, whose paths were expanded when the run began."""

FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""For a tuple: YAML has lists. A set, which pydantic would take too, has no order."""


def _expand_targets(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if value == ["all-linear"]:
        value = list(LINEAR_MODULES)
    if isinstance(value, list):
        unknown = [name for name in value if name not in LINEAR_MODULES]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), LINEAR_MODULES, 1)
            hint = f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(LINEAR_MODULES)} and all-linear"
            raise ValueError(f"no linear layer called {unknown[0]!r}{hint}")
        if len(set(value)) != len(value) or not value:
            raise ValueError("names no layer" if not value else "names a layer twice")
        return tuple(sorted(value, key=LINEAR_MODULES.index))
    return value


def _check_whole(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if isinstance(value, list):
        known = list(WHOLE_MODULES)
        unknown = [name for name in value if name not in known]
        if unknown:
            others = f"there are {', '.join(known)}, which is the final norm"
            raise ValueError(f"{unknown[0]!r} cannot be trained whole; {others}")
        if len(set(value)) != len(value):
            raise ValueError("names a module twice")
        return tuple(sorted(value, key=known.index))
    return value


def _checkpointing_mode(value: Any) -> Any:
    if isinstance(value, str) and is_mode(value):
        return value
    raise ValueError(f"not one of {', '.join(MODES)}")


def _memory_size(value: str) -> str:
    if value != "auto":
        try:
            parse_size(value, "memory_limit")
        except SpecError as fault:
            raise ValueError(f"{fault.what}, and not auto; {fault.todo}") from None
    return value


def shown(value: object) -> str:
    """A value as a message names it; Python refuses to write a number of thousands of digits."""
    is_endless = isinstance(value, int) and abs(value) > sys.float_info.max
    return "beyond the range of numbers" if is_endless else repr(value)


def _learning_rate(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise ValueError(f"should be a valid number above 0, auto or null (it is {shown(value)})")


def _duration(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        try:
            parse_duration(value, "a time")
        except SpecError as fault:
            raise ValueError(f"{fault.what}; {fault.todo}") from None
    return value


def _expanded(value: str, info: ValidationInfo) -> str:
    try:
        return expand_path(value, variables=not (info.context or {}).get(STORED))
    except SpecError as fault:
        raise ValueError(f"{fault.what}; {fault.todo}") from None


def _directories(value: Any, info: ValidationInfo) -> Any:
    """A directory as its path; several as a tuple of paths. A list of one is that one."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        shown = "null" if value is None else repr(value)
        raise ValueError(f"should be a directory, or a list of directories (it is {shown})")
    if not all(paths) or not paths:
        raise ValueError("names no directory")
    expanded = tuple(_expanded(path, info) for path in paths)
    if len(set(expanded)) != len(expanded):
        raise ValueError("names a directory twice; rows are repeated by a weight of prepare-data, as in rows.jsonl:2")
    return expanded[0] if len(expanded) == 1 else expanded


def _names(known: Sequence[str], most: str | None = None) -> WithJsonSchema:
    """A list of names without repetition, or a comma list; with ``most`` that word for all of them."""
    every, one = [*known, *([most] if most else [])], "|".join(known)
    comma_list = {"type": "string", "pattern": rf"^\s*({one})\s*(,\s*({one})\s*)*$"}
    word = [{"const": most}] if most else []
    listed = {"type": "array", "items": {"enum": every}, "uniqueItems": True} | ({"minItems": 1} if most else {})
    return WithJsonSchema({"anyOf": [*word, listed, comma_list]})


_TEXT = {"type": "string", "minLength": 1}


def _device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(_DEVICE, value):
        raise ValueError(f"should be auto, cpu, cuda or cuda:N (it is {value!r})")
    return value


NonEmptyText = Annotated[str, Field(min_length=1)]
PathText = Annotated[NonEmptyText, AfterValidator(_expanded), WithJsonSchema(_TEXT)]
Directories = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_directories),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}]}),
]
Positive = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1, lt=1 << 63)]
Epochs = Annotated[
    float,
    Field(gt=0, le=1e9),
    AfterValidator(lambda value: int(value) if float(value).is_integer() else value),
    PlainSerializer(lambda value: value),  # else a whole number would be written as 3.0
]
"""A number of passes over the rows, which may be a fraction; 3.0 is 3."""
Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TargetModules = Annotated[tuple[str, ...], BeforeValidator(_expand_targets), _names(LINEAR_MODULES, "all-linear")]
WholeModules = Annotated[tuple[str, ...], BeforeValidator(_check_whole), _names(tuple(WHOLE_MODULES))]
CheckpointingMode = Annotated[
    str,
    BeforeValidator(_checkpointing_mode),
    WithJsonSchema({
        "anyOf": [
            {"enum": [mode for mode in MODES if is_mode(mode)]},
            {"type": "string", "pattern": r"^every_([2-9]|[1-9]\d{1,2})$"},
        ]
    }),
]  # fmt: skip
Device = Annotated[str, BeforeValidator(_device), Field(pattern=f"^({_DEVICE})$")]
LearningRate = Annotated[Annotated[float, Field(gt=0)] | Literal["auto"] | None, BeforeValidator(_learning_rate)]
MemorySize = Annotated[
    str,
    AfterValidator(_memory_size),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?[KMGT]i?B$"}]}),
]
Duration = Annotated[str, BeforeValidator(_duration)]
"""``units.parse_duration`` reads it; a number alone is minutes, as in Slurm."""
