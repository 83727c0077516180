"""A verb as a Typer command: its signature made from an options class, values given once, ``~`` in paths expanded."""

from __future__ import annotations

import functools
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from llamatune.commands._input_text import as_utf8
from llamatune.errors import SpecError
from llamatune.options.option import OptionField, Options, option_fields
from llamatune.paths import expand_home


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose first parameter may be an options class, as a function of that class's options for Typer."""
    parameters = typing.get_type_hints(verb, include_extras=True)
    options = next(iter(parameters.values()))
    if not (isinstance(options, type) and issubclass(options, Options)):
        return verb
    declared = option_fields(options)

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        given = {field.name: _parsed(field, values.pop(field.name)) for field in declared}
        verb(options(**{name: value for name, value in given.items() if value is not None}), **values)

    _, *others = inspect.signature(verb).parameters.values()
    signature = [_parameter(field) for field in declared]
    signature += [other.replace(annotation=parameters[other.name], kind=Parameter.KEYWORD_ONLY) for other in others]
    run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    return run


def _parsed(field: OptionField, value: Any) -> Any:
    if isinstance(value, list):
        return [as_utf8(item, field.flag) if isinstance(item, str) else item for item in value] or None
    return value if value is None or field.option.parse is None else field.option.parse(value, field.flag)


def _parameter(field: OptionField) -> Parameter:
    option, default = field.option, field.default
    # readable=False: Typer would call a missing permission a mistake of usage; here it is exit code 5.
    shown: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "readable": False}
    if field.required or default is None or default == ():
        shown["show_default"] = option.shown_default or False
    info = typer.Argument(**shown) if option.argument else typer.Option(field.flag, **shown)
    kind: Any = str if field.choices or option.parse else field.kind
    if typing.get_origin(kind) is Sequence:
        kind, default = list[typing.get_args(kind)[0]], default or None  # type: ignore[misc]
    if field.required:
        return Parameter(field.name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info])
    optional = kind if default is not None else kind | None
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, info])


class _Strict:
    """Put before a Typer class: it checks what the parser found, before a value is converted."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)  # type: ignore[misc]
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            values, rest, order = parse(args)
            if not ctx.resilient_parsing:  # a shell asks for completions
                _refuse_twice(order)
                _expand_paths(values, getattr(ctx.command, "callback", None))
            return values, rest, order

        parser.parse_args = parse_args
        return parser


class StrictCommand(_Strict, TyperCommand):
    """A verb of the command line."""


class StrictGroup(_Strict, TyperGroup):
    """All verbs."""


def _refuse_twice(order: list[Any]) -> None:
    """``order`` holds an option as often as it was given; a flag may be repeated."""
    for option, times in Counter(order).items():
        if times > 1 and not (option.multiple or option.count or (option.is_flag and not option.secondary_opts)):
            raise SpecError(f"{max(option.opts, key=len)} is given {times} times", None, "it takes one value, keep one")


def _expand_paths(values: dict[str, Any], verb: Any) -> None:
    """Expand, in place, the raw values of parameters that are paths."""
    if not any("~" in str(value) for value in values.values()):
        return
    for name, hint in typing.get_type_hints(verb).items():
        value = values.get(name)
        if value is None or not _is_path(hint):
            continue
        values[name] = expand_home(value) if isinstance(value, str) else [expand_home(text) for text in value]


def _is_path(hint: Any) -> bool:
    return hint is Path or any(map(_is_path, typing.get_args(hint)))
