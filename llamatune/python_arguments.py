"""Arguments of the Python API: their types, by the annotations of its functions; a spec's values made plain."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_WORDS: Mapping[Any, tuple[str, type]] = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("text", str),
    os.PathLike: ("a path", os.PathLike),
    types.NoneType: ("None", types.NoneType),
    collections.abc.Callable: ("a function", collections.abc.Callable),  # type: ignore[dict-item]
}
"""Of what is no collection: as a message calls it, and what it is an instance of. NumPy's numbers are numbers."""


_SEVERAL = (collections.abc.Sequence, tuple)


def check_arguments(function: F) -> F:
    """The function, which raises a ``TypeError`` with an argument's name before it begins if its type is wrong.

    A list may be anything that can be iterated; what is passed on is a list, or a tuple where one is annotated.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*given, **named)
        except TypeError:  # Python's own names the function too
            return function(*given, **named)
        hints = _hints(function)
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                known = typing.get_type_hints(typing.get_args(hints[name])[0])
                for key, option in value.items():
                    if key not in known:
                        raise TypeError(f"{function.__name__}() got an unexpected keyword argument {key!r}")
                    value[key] = _checked(option, known[key], key, function.__name__)
            else:
                bound.arguments[name] = _checked(value, hints[name], name, function.__name__)
        return function(*bound.args, **bound.kwargs)

    return typing.cast(F, checked)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    names = {}
    if any("RunSpec" in str(hint) for hint in function.__annotations__.values()):  # it loads pydantic
        from llamatune.spec import RunSpec

        names["RunSpec"] = RunSpec
    return typing.get_type_hints(function, localns=names)


def _checked(value: Any, hint: Any, name: str, function: str) -> Any:
    """The value as one of the annotation's types."""
    kinds = _members(hint)
    several = next((kind for kind in kinds if typing.get_origin(kind) in _SEVERAL), None)
    inner = None if several is None else typing.get_args(several)[0]
    if any(_is(value, kind) for kind in kinds if kind is not several):
        return value
    if isinstance(value, str) and str in _members(inner):
        return value  # one text stands for a list of one
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, os.PathLike)) or several is None:
        raise TypeError(f"{function}(): {name} is {value!r:.80}, where {_described(kinds)} is expected")
    items = [_checked(item, inner, f"{name}[{place}]", function) for place, item in enumerate(value)]
    return tuple(items) if typing.get_origin(several) is tuple else items


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of which a value has one: those of a union, each apart."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(member for part in typing.get_args(hint) for member in _members(part))
    return (hint,)


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:  # whether it is one of them is for the option to say
        return isinstance(value, str)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping)
    wanted = _WORDS[origin][1] if origin in _WORDS else origin
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _described(kinds: Iterable[Any]) -> str:
    return " or ".join(dict.fromkeys(map(_word, kinds)))


def _word(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if origin in _SEVERAL:
        return f"a list of {_described(_members(typing.get_args(kind)[0]))}"
    if origin is collections.abc.Mapping:
        return "a dict"
    return _WORDS[origin][0] if origin in _WORDS else f"a {origin.__name__}"


def plain_values(value: Any) -> Any:
    """A copy of the values of a spec as YAML has them: text for paths, Python's numbers for those of NumPy."""
    match value:
        case Mapping():
            return {key: plain_values(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain_values(item) for item in value]
        case os.PathLike():
            return os.fspath(value)
        case bool() | int() | float():
            return value
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
    return value
