"""PyTorch's zip format (``torch.save``) read as data: nothing in it is ever unpickled. No torch.

The pickle inside is walked by a small machine that knows the twenty-odd opcodes a plain ``dict[str, Tensor]`` needs and
turns each tensor into the byte range it occupies. There is nothing to call, so there is nothing a file could run.

A tensor may be a view: ``torch.save`` writes a piece of ``torch.chunk``, or a transposed weight, as strides into the
whole storage. Views are read as long as no two of their elements are one, so nothing can be larger than its file.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorEntry
from llamatune.safe_reading import open_regular
from llamatune.shapes.dtypes import ITEM_BYTES

STORAGE_CLASSES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage"}
_DTYPES = {name: dtype for dtype, name in STORAGE_CLASSES.items()}
_FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_LARGEST_PICKLE = 4 << 20
_LARGEST_NUMBER = 1 << 40
_MAY_SHARE = {"tok_embeddings.weight", "output.weight"}
"""A tied head is saved as two names, or two views, of one storage; no other tensors may overlap."""


@dataclass(frozen=True)
class ArchivedTensor(TensorEntry):
    """A tensor of an archive. A view's elements lie ``strides`` apart in ``begin:end``; None: they fill it in order."""

    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle holds something other than plain tensors."""


def read_archive(path: Path) -> dict[str, ArchivedTensor]:
    """The tensors of a ``torch.save`` file and where their bytes lie, proven to be plain and apart.

    Raises:
        CheckpointError: a legacy or raw pickle, compressed records, an opcode or global that plain tensors do not
            need (named), bytes missing or left over, elements that overlap, views that leave their storage.
    """
    with open_regular(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        magic = file.read(64)
        if not magic.startswith(b"PK\x03\x04"):
            raise CheckpointError(_foreign(file, magic, file_bytes), path, "fetch it again or save it with torch.save")
        try:
            records = _records(file, file_bytes)
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise _RefusedError(f"{len(pickles)} data.pkl records where one is expected")
            prefix = pickles[0].removesuffix("data.pkl")
            byteorder = records.get(f"{prefix}byteorder")
            if byteorder and _bytes_of(file, byteorder, 16) != b"little":
                raise _RefusedError("big-endian tensors")
            content = _walk(_bytes_of(file, records[pickles[0]], _LARGEST_PICKLE))
            entries = {name: _entry(name, value, records, prefix) for name, value in content.items()}
        except _RefusedError as fault:
            raise CheckpointError(
                f"refused: {fault}", path, "only plain tensors saved by torch.save are read"
            ) from None
        except (ValueError, LookupError, TypeError, struct.error, RecursionError, NotImplementedError) as fault:
            raise CheckpointError(f"broken PyTorch file: {fault}", path, "fetch it again") from None
    _refuse_overlap(entries, path)
    return entries


def _records(file: BinaryIO, file_bytes: int) -> dict[str, tuple[int, int]]:
    """``(begin, end)`` of every record; the archive must fill the file and hold nothing compressed."""
    file.seek(max(0, file_bytes - 22))
    if file.read(4) != b"PK\x05\x06":
        raise ValueError(
            f"the end of the archive is not at the file's end ({file_bytes:,} bytes): cut short or extended"
        )
    try:
        infos = zipfile.ZipFile(file).infolist()
    except zipfile.BadZipFile as fault:
        raise ValueError(str(fault)) from None
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise _RefusedError(
                f"record {info.filename!r} is compressed or encrypted ({info.file_size:,} bytes unpacked)"
            )
        if info.filename in records:
            raise _RefusedError(f"record {info.filename!r} appears twice")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or header[8:10] != b"\0\0":
            raise ValueError(f"record {info.filename!r} has no header of its own")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        records[info.filename] = (begin, begin + info.file_size)
    position = 0
    for name, (begin, end) in sorted(records.items(), key=lambda item: item[1]):
        if begin < position or end > file_bytes:
            raise _RefusedError(f"record {name!r} overlaps another one or ends after the file's {file_bytes:,} bytes")
        position = end
    return records


def _bytes_of(file: BinaryIO, record: tuple[int, int], most: int) -> bytes:
    begin, end = record
    if end - begin > most:
        raise _RefusedError(f"a record of {end - begin:,} bytes where {most:,} are allowed")
    file.seek(begin)
    return file.read(end - begin)


def _walk(pickle: bytes) -> dict[str, Any]:
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
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                items, stack = tuple(stack), outer.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("a tuple of nothing")
                stack[-count:] = [tuple(stack[-count:])]
            case "GLOBAL":
                stack.append(_allowed(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(f"{module}.{name}" if type(name) is type(module) is str else "?"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items_, stack = stack, outer.pop()
                _set(stack[-1], items_)
            case "BUILD":  # an OrderedDict's attributes, such as the _metadata of a state dict: not needed
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _RefusedError("an object with attributes")
            case "STOP":
                break
            case other:
                raise _RefusedError(f"the pickle opcode {other}")
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise _RefusedError("something other than a dictionary of tensors")
    return stack[0]


def _allowed(name: str) -> _Global:
    if name in _FUNCTIONS or (name.startswith("torch.") and name.removeprefix("torch.") in _DTYPES):
        return _Global(name)
    raise _RefusedError(f"it names {name}, which plain float tensors do not need (code could run)")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items of no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise _RefusedError("a dictionary key that is no string")
        target[key] = value


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(name=name), str(key), str(), int(numel)) if name.removeprefix("torch.") in _DTYPES:
            return _Storage(_DTYPES[name.removeprefix("torch.")], key, numel)
    raise _RefusedError("a storage of an unknown kind")


def _reduced(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global(name="collections.OrderedDict"), ():
            return {}
        case _Global(name="torch._utils._rebuild_parameter"), (_Tensor() as tensor, bool(), dict()):
            return tensor
        case (
            _Global(name="torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(), *rest),
        ) if not any(rest):
            numbers = (storage.numel, offset, *shape, *stride)
            if not all(type(n) is int and 0 <= n < _LARGEST_NUMBER for n in numbers) or len(shape) != len(stride):
                raise _RefusedError("a tensor of impossible sizes")
            return _Tensor(storage, offset, shape, stride)
    raise _RefusedError("a call that plain tensors do not need")


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """From a view's first element to behind its last one; each dimension must step over all the finer ones."""
    if 0 in shape:
        return 0
    reach = 0
    for step, count in sorted(zip(stride, shape, strict=True)):
        if count > 1 and step <= reach:
            raise _RefusedError(f"a tensor of shape {list(shape)} with strides {list(stride)}: its elements overlap")
        reach += step * (count - 1)
    return reach + 1


def _entry(name: str, value: Any, records: dict[str, tuple[int, int]], prefix: str) -> ArchivedTensor:
    if not isinstance(value, _Tensor):
        raise _RefusedError(f"{name!r} is not a tensor")
    storage = value.storage
    if f"{prefix}data/{storage.key}" not in records:
        raise ValueError(f"tensor {name} has no data record")
    begin, end = records[f"{prefix}data/{storage.key}"]
    item_bytes = ITEM_BYTES[storage.dtype]
    extent = _extent(value.shape, value.stride)
    if value.offset + extent > storage.numel or storage.numel * item_bytes > end - begin:
        raise _RefusedError(
            f"tensor {name} of shape {list(value.shape)} is larger than its storage of {end - begin:,} bytes"
        )
    first = begin + value.offset * item_bytes
    # A view that misses no element of its extent and has them in order is no view to its readers.
    in_order = [step for step, count in zip(value.stride, value.shape, strict=True) if count > 1]
    plain = extent == 0 or (extent == math.prod(value.shape) and in_order == sorted(in_order, reverse=True))
    strides = None if plain else value.stride
    return ArchivedTensor(storage.dtype, value.shape, first, first + extent * item_bytes, strides)


def _refuse_overlap(entries: dict[str, ArchivedTensor], path: Path) -> None:
    """Extents must be apart: all tensors together are then no larger than the file, apart from a tied head."""
    position, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position and {name, before} != _MAY_SHARE:
            raise CheckpointError(f"refused: tensors {before} and {name} share bytes", path, "fetch it again")
        position, before = max(position, entry.end), name


def _foreign(file: BinaryIO, magic: bytes, file_bytes: int) -> str:
    """What a file that is no zip archive is, naming a suspicious global if there is one."""
    if file_bytes == 0:
        return "an empty file"
    if magic.startswith(b"version "):
        return "a git-lfs pointer, not the file itself"
    if magic.lstrip().lower().startswith((b"<!doc", b"<html")):
        return "an HTML page, not a PyTorch file"
    if magic[:1] not in (b"\x80", b"(", b"c", b"}", b"]"):
        tar = file_bytes > 512
        return "not a PyTorch zip file (a tar or unknown format is not read)" if tar else "not a PyTorch file"
    return f"a legacy or raw pickle, which is not read because it can run code{_named_global(file)}"


def _named_global(file: BinaryIO) -> str:
    file.seek(0)
    strings: list[str] = []
    position = 0
    data = file.read(1 << 20)
    try:
        while position < len(data):  # a legacy file is several pickles in a row
            for opcode, argument, at in pickletools.genops(data[position:]):
                if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    _allowed(".".join(strings[-2:]))
                elif opcode.name in ("GLOBAL", "INST"):
                    _allowed(str(argument).replace(" ", "."))
                elif isinstance(argument, str):
                    strings.append(argument)
                end = (at or 0) + 1
            position += end
    except _RefusedError as fault:
        return f": {fault}"
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return ""
