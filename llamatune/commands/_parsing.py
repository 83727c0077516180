"""What holds for the command line of every verb: one value is given once, and a path may begin with ``~``."""

from __future__ import annotations

import typing
from collections import Counter
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from llamatune.errors import SpecError
from llamatune.paths import expand_home


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
    """All of them."""


def _refuse_twice(order: list[Any]) -> None:
    """``order`` holds an option as often as it was given; a flag says the same twice."""
    for option, times in Counter(order).items():
        if times > 1 and not (option.multiple or option.count or (option.is_flag and not option.secondary_opts)):
            raise SpecError(f"{max(option.opts, key=len)} is given {times} times", None, "it takes one value, keep one")


def _expand_paths(values: dict[str, Any], verb: Any) -> None:
    """Expand, in place, the raw values of parameters that are paths."""
    if not any("~" in str(value) for value in values.values()):
        return
    for name, hint in typing.get_type_hints(verb).items():
        given = values.get(name)
        if given is None or not _is_path(hint):
            continue
        values[name] = expand_home(given) if isinstance(given, str) else [expand_home(text) for text in given]


def _is_path(hint: Any) -> bool:
    return hint is Path or any(map(_is_path, typing.get_args(hint)))
