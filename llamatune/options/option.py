"""Option declarations: a dataclass field with help, bounds and choices, which are checked when it is made."""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Callable
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from llamatune.errors import SpecError


@dataclass(frozen=True)
class Option:
    """What the field of an options class declares beside its type and default.

    Args:
        flag: the spelling, where it is not the field's name in kebab-case.
        shown_default: what stands for a default of None, as ``--help`` shows it.
        parse: makes the value from its text and the flag.
        argument: given by its place on the command line, without a flag.
        last: listed after the options of a verb that are not.
        at_least, above, at_most, below: bounds.
    """

    help: str
    _: KW_ONLY
    metavar: str | None = None
    flag: str | None = None
    shown_default: str | None = None
    parse: Callable[[str, str], Any] | None = None
    argument: bool = False
    last: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None


def option(help: str, default: Any = MISSING, **declared: Any) -> Any:
    """The field of an options class; ``declared`` are arguments of ``Option``. Without a default it is required."""
    return field(default=default, metadata={"option": Option(help, **declared)})


_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class OptionField:
    """A field of an options class: ``kind`` is its type without None; ``required`` fields have no default."""

    name: str
    kind: Any
    option: Option
    default: Any

    @property
    def flag(self) -> str:
        return self.option.flag or f"--{self.name.replace('_', '-')}"

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
        bounds = {name: bound for name in _BOUNDS if (bound := getattr(self.option, name)) is not None}
        if not all(_BOUNDS[name](value, bound) for name, bound in bounds.items()):
            stated = " and ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds.items())
            raise SpecError(f"{self.flag} is {value}", None, f"it must be {stated}")


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


def option_fields(options: type[Options]) -> tuple[OptionField, ...]:
    """The options that a class and its bases declare, in the order of the command line: required ones come first."""
    declared = [_option_field(declared) for declared in fields(options)]
    return tuple(sorted(declared, key=lambda field: (not field.required, field.option.last)))


def _option_field(declared: Field[Any]) -> OptionField:
    kind: Any = declared.type
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return OptionField(declared.name, kind, declared.metadata["option"], declared.default)
