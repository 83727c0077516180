"""Option declarations: a dataclass field with help, bounds and choices, which are checked when it is made."""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from llamatune.errors import SpecError

Writes = Literal["file", "product", "answers", "run"]
_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Option:
    """An option, which is declared by a field of an options class and has the field's ``name``.

    Args:
        default: of the field; one without a default is required.
        kind: the field's type without None, unless another is declared.
        flag: the spelling; if none is declared, the field's name in kebab-case.
        shown_default: what stands for a default of None, as ``--help`` shows it.
        parse: makes the value from its text and the flag.
        argument: given by its place on the command line, without a flag.
        last: listed after the options of a verb that are not.
        writes: what the verb writes at this path, or a function of the path that says it. A ``file`` or a ``product``
            (a directory) is made at once; ``answers`` (a file) and a ``run`` (a directory) are continued.
        weighted: files of rows, each of which may have a weight (``row_input``).
        holds_outputs: a directory that is read, and that outputs may be inside of.
        at_least, above, at_most, below: bounds.
    """

    help: str
    default: Any = MISSING
    _: KW_ONLY
    name: str = ""
    kind: Any = None
    metavar: str | None = None
    flag: str = ""
    shown_default: str | None = None
    parse: Callable[[str, str], Any] | None = None
    argument: bool = False
    last: bool = False
    writes: Writes | Callable[[Path], Writes] | None = None
    weighted: bool = False
    holds_outputs: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def choices(self) -> tuple[Any, ...]:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    def check(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            known = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            raise SpecError(f"{self.flag} is {value!r}", None, f"it must be {known}")
        bounds = {name: bound for name in _BOUNDS if (bound := getattr(self, name)) is not None}
        if not all(_BOUNDS[name](value, bound) for name, bound in bounds.items()):
            stated = " and ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds.items())
            raise SpecError(f"{self.flag} is {value}", None, f"it must be {stated}")


def option(help: str, default: Any = MISSING, **declared: Any) -> Any:
    """The field of an options class; ``declared`` are arguments of ``Option``."""
    return field(default=default, metadata={"option": Option(help, default, **declared)})


@dataclass(frozen=True)
class Options:
    """Base of the options classes.

    Raises:
        SpecError: a value is out of its bounds, or none of its choices.
    """

    def __post_init__(self) -> None:
        for declared in option_fields(type(self)):
            value = getattr(self, declared.name)
            if value is not None:
                declared.check(value)
            if declared.required and not declared.argument and isinstance(value, Sequence) and not value:
                raise SpecError(f"{declared.flag} is empty", None, "give at least one")


def option_fields(options: type[Options]) -> list[Option]:
    """The options that a class and its bases declare, in the order of the command line: required ones come first."""
    return sorted(map(_declared_option, fields(options)), key=lambda option: (not option.required, option.last))


def _declared_option(declared: Field[Any]) -> Option:
    made: Option = declared.metadata["option"]
    kind: Any = made.kind or declared.type
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return replace(made, name=declared.name, kind=kind, flag=made.flag or f"--{declared.name.replace('_', '-')}")
