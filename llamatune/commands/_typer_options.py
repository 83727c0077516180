"""A verb as a Typer command: its signature made from an options class, values given once, ``~`` and ``$`` in paths."""

from __future__ import annotations

import functools
import os
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from llamatune.command_options.option import Option, Options, option_fields
from llamatune.command_options.outputs import check_outputs
from llamatune.commands._completion import completer
from llamatune.commands._console import Console, faults_of_stdout
from llamatune.commands._several_ranks import run_on_first
from llamatune.errors import SpecError
from llamatune.launch_variables import read_launch
from llamatune.math_library_variables import prepare_math_libraries
from llamatune.openmp_variables import prepare_openmp
from llamatune.output_files import STDOUT
from llamatune.path_expansion import expand_path

_JSON = typer.Option(False, "--json", help="Print the result as one JSON object.", metavar="")


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb of ``(options, console)`` as a function of the options class's fields and ``--json``, for Typer.

    Of several processes the first alone runs it. A verb of ``(options, console, launch)`` runs in all, which share its
    work.
    """
    hints = typing.get_type_hints(verb)
    options: type[Options] = hints["options"]
    declared = option_fields(options)

    @functools.wraps(verb)
    def run(json_mode: bool, **values: Any) -> None:
        prepare_openmp()
        prepare_math_libraries()
        launch = read_launch()
        given = {option.name: _parsed(option, values[option.name]) for option in declared}
        request = options(**{name: value for name, value in given.items() if value is not None})
        to_stdout = launch.rank == 0 and check_outputs(request)
        if to_stdout and json_mode:
            raise SpecError("--json and an output that is stdout exclude each other", None, "leave one of them out")
        console = Console(json_mode, launch.rank == 0, not to_stdout)
        if "launch" in hints:
            verb(request, console, launch)
        elif launch.world_size == 1:
            verb(request, console)
        else:
            run_on_first(launch, lambda: verb(request, console))

    json_mode = Parameter("json_mode", Parameter.KEYWORD_ONLY, default=_JSON, annotation=bool)
    parameters = [*map(_parameter, declared), json_mode]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parsed(option: Option, value: Any) -> Any:
    if isinstance(value, list):
        return [_as_utf8(item, option.flag) if isinstance(item, str) else item for item in value] or None
    return value if value is None or option.parse is None else option.parse(value, option.flag)


def _output_path(text: str) -> Path:
    """The path of an output file; ``-`` is stdout, and ``./-`` a file."""
    return STDOUT if text == "-" else _path(text)


def _path(text: str) -> Path:
    """A path from its text, in which ``./~name`` still differs from ``~name``."""
    return Path(expand_path(str(text)))


def _as_utf8(text: str, where: str) -> str:
    """An argument as UTF-8 text, also in a locale that decoded it as something else."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise SpecError(f"not UTF-8 at byte {fault.start}", where) from None


def _parameter(option: Option) -> Parameter:
    kind, default = option.kind, None if option.default == () else option.default
    shown: dict[str, Any] = {"help": option.help, "metavar": _metavar(option)}
    if kind in (Path, Sequence[Path]):
        shown["parser"] = _output_path if option.writes in ("file", "answers") else _path
    shown["show_default"] = option.shown_default or not (option.required or default is None)
    if (offered := completer(option)) is not None:
        shown["autocompletion"] = offered
    given = ... if option.required else default
    info = typer.Argument(given, **shown) if option.argument else typer.Option(given, option.flag, **shown)
    if option.choices or option.parse:
        kind = str
    elif typing.get_origin(kind) is Sequence:
        kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
    if default is None:
        kind |= None
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=info, annotation=kind)


_NAMED = {"device": "DEVICE", "dtype": "DTYPE", "format": "FORMAT", "template": "NAME|FILE"}
"""By an option's name: what it takes in every verb that has it."""
_METAVARS = {bool: "", int: "N", float: "X", Path: "PATH"}
_WRITTEN = {"file": "FILE", "answers": "FILE", "product": "DIR", "run": "DIR"}


def _metavar(option: Option) -> str:
    """What stands for the value in ``--help``, in capitals; nothing after a flag."""
    if option.metavar is not None:
        return option.metavar
    if option.name in _NAMED:
        return _NAMED[option.name]
    if isinstance(option.writes, str):
        return _WRITTEN[option.writes]
    kind = typing.get_args(option.kind)[0] if typing.get_origin(option.kind) is Sequence else option.kind
    return "NAME" if option.choices else _METAVARS.get(kind, "TEXT")


class _NamedArgument(TyperArgument):
    """An argument whose name in ``--help`` tells what it is; typer would add ``<list[Path]>``."""

    def display_type_rich(self, ctx: Any) -> str | None:
        return None


def _without_values(params: list[Any]) -> list[Any]:
    """The parameters, flags without a placeholder: typer would show ``<bool>``."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class StrictCommand(TyperCommand):
    """A verb of the command line. An option that takes one value may be given once."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **options: Any) -> None:
        for param in params or ():
            if type(param) is TyperArgument:
                param.__class__ = _NamedArgument
        super().__init__(*args, params=params, **options)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS] SPEC.yaml [KEY=VALUE ...]``: what may be left out stands in brackets."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        names = [str(param.metavar or param.name) for param in arguments]
        optional = [not (of.required or name.startswith("[")) for name, of in zip(names, arguments, strict=True)]
        return [
            "[OPTIONS]",
            *(f"[{name}]" if left_out else name for name, left_out in zip(names, optional, strict=True)),
        ]

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # a shell asks for completions
            _refuse_twice(self.make_parser(ctx).parse_args(list(args))[2])
        with faults_of_stdout():  # --help is printed here
            return super().parse_args(ctx, args)


class VerbGroup(TyperGroup):
    """The verbs of the command line, and the options beside them, which print and end the program."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with faults_of_stdout():
            return super().parse_args(ctx, args)


def _refuse_twice(order: list[Any]) -> None:
    """``order`` holds an option as often as it was given; a flag may be repeated."""
    for option, times in Counter(order).items():
        if times > 1 and not (option.multiple or option.is_flag):
            raise SpecError(f"{max(option.opts, key=len)} is given {times} times", None, "it takes one value, keep one")
