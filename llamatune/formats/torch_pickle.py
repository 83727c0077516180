"""The pickle inside a PyTorch archive, walked opcode by opcode: a dictionary of tensor descriptions, nothing called.

``torch.load`` is not used because a pickle can run code. The machine here knows the twenty-odd opcodes that a plain
``dict[str, Tensor]`` needs and refuses every other opcode, global and call.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from typing import Any

STORAGE_CLASSES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage"}
_DTYPES = {f"torch.{name}": dtype for dtype, name in STORAGE_CLASSES.items()}
_FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LARGEST_NUMBER = 1 << 40


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class PickledStorage:
    """A run of elements in the record ``data/<key>`` of the archive."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides in elements."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class RefusedError(Exception):
    """The pickle holds something other than plain tensors."""


class BrokenError(Exception):
    """The file is damaged, in plain words."""


def walk_pickle(pickle: bytes) -> dict[str, Any]:
    """The dictionary that a pickle of plain tensors describes."""
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                outer.append(stack)
                stack = []
            case "EMPTY_DICT":
                stack.append({})
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if opcode.name == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                items, stack = tuple(stack), outer.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise BrokenError("a tuple of nothing")
                stack[-count:] = [tuple(stack[-count:])]
            case "GLOBAL":
                stack.append(_allowed(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                qualified, module = stack.pop(), stack.pop()
                stack.append(_allowed(f"{module}.{qualified}" if type(qualified) is type(module) is str else "?"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                pairs, stack = stack, outer.pop()
                _set(stack[-1], pairs)
            case "BUILD":  # an OrderedDict's attributes, such as the _metadata of a state dict: not needed
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise RefusedError("an object with attributes")
            case "STOP":
                break
            case other:
                raise RefusedError(f"the pickle opcode {other}")
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise RefusedError("something other than a dictionary of tensors")
    return stack[0]


def _allowed(name: str) -> _Global:
    if name in _FUNCTIONS or name in _DTYPES:
        return _Global(name)
    raise RefusedError(f"it names {name}, which plain float tensors do not need (code could run)")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise BrokenError("items of no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise RefusedError("a dictionary key that is no string")
        target[key] = value


def _storage(identity: Any) -> PickledStorage:
    match identity:
        case ("storage", _Global(name=name), str(key), str(), int(numel)) if name in _DTYPES:
            return PickledStorage(_DTYPES[name], key, numel)
    raise RefusedError("a storage of an unknown kind")


def _reduced(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global(name="collections.OrderedDict"), ():
            return {}
        case _Global(name="torch._utils._rebuild_parameter"), (PickledTensor() as tensor, bool(), dict()):
            return tensor
        case (
            _Global(name="torch._utils._rebuild_tensor_v2"),
            (PickledStorage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(), *rest),
        ) if not any(rest):
            numbers = (storage.numel, offset, *shape, *stride)
            if not all(type(n) is int and 0 <= n < _LARGEST_NUMBER for n in numbers) or len(shape) != len(stride):
                raise RefusedError("a tensor of impossible sizes")
            return PickledTensor(storage, offset, shape, stride)
    raise RefusedError("a call that plain tensors do not need")


def refused_global(data: bytes) -> str:
    """Why a legacy file would be refused, from the first bytes of its pickles: the global that it names, or nothing."""
    strings: list[str] = []
    pickles = io.BytesIO(data)
    try:
        while pickles.tell() < len(data):  # a legacy file is several pickles in a row
            for opcode, argument, _ in pickletools.genops(pickles):
                if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    _allowed(".".join(strings[-2:]))
                elif opcode.name in ("GLOBAL", "INST"):
                    _allowed(str(argument).replace(" ", "."))
                elif isinstance(argument, str):
                    strings.append(argument)
    except RefusedError as fault:
        return f": {fault}"
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return ""
