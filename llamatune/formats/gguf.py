"""The GGUF format of llama.cpp: a strict reader of its header, and a writer that streams. No torch, no other package.

A file is a magic number, a version and two counts; metadata; each tensor's name, shape, type and offset; then the data,
every tensor aligned. The package ``gguf`` maps a file and trusts its counts; here every count and length is compared
with the bytes that are left before anything of that size is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorLocation
from llamatune.safe_reading import open_regular, read_faults, stand_in

SUFFIX = ".gguf"
Metadata = Mapping[str, tuple[str, Any]]
"""A kind and a value by key. Kinds are ``u32``, ``f32``, ``bool``, ``str``, ... and ``[str]``, ..."""

_MAGIC, _VERSIONS, _WRITTEN_VERSION, _ALIGNMENT = b"GGUF", (2, 3), 3, 32
_KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8,
          "u64": 10, "i64": 11, "f64": 12}  # fmt: skip
_KIND_OF_NUMBER = {number: kind for kind, number in _KINDS.items()}
_ARRAY = 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _FLOAT, _BOOL = _KINDS["str"], _KINDS["f32"], _KINDS["bool"]
_LARGEST_HEADER, _LONGEST_STRING, _LONGEST_NAME = 1 << 28, 1 << 24, 256
_MOST_ENTRIES, _MOST_ELEMENTS, _MOST_DIMENSIONS, _LARGEST_DIMENSION = 1 << 17, 1 << 22, 4, 1 << 40

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Each type of tensor by its number: its name, the values of a block and the bytes of one (``ggml.h``)."""
BLOCKS = {name: (values, size) for name, values, size in TYPES.values()}
_NUMBER_OF_TYPE = {name: number for number, (name, _, _) in TYPES.items()}


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a file. Shapes are PyTorch's, (out, in), where the file has (in, out).

    ``entries`` have the kinds that they are stored in. A number in 32 bits is the shortest decimal that rounds to it:
    1e-5, not 9.99999974e-06.
    """

    path: Path
    entries: Metadata
    tensors: dict[str, TensorLocation]

    @property
    def metadata(self) -> dict[str, Any]:
        return {key: value for key, (_, value) in self.entries.items()}


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with open_regular(path) as file, read_faults(path):
        return file.read(4) == _MAGIC


def read_gguf(path: Path) -> GgufHeader:
    """The header, proven consistent with the file's size. No tensor is read.

    Raises:
        CheckpointError: another format, another byte order or version, a cut or mutated header, a type that is not
            known, tensors that overlap, leave a gap or leave the file.
    """
    with open_regular(path) as file, read_faults(path):
        file_bytes = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        if head[:4] != _MAGIC:
            raise CheckpointError(stand_in(head) or "not a GGUF file", path, "fetch it again")
        if len(head) < 8:
            raise CheckpointError(f"broken GGUF header: {file_bytes} bytes", path, "fetch it again")
        cursor = _Cursor(file, min(file_bytes, _LARGEST_HEADER) - 8)
        try:
            (version,) = struct.unpack("<I", head[4:])
            if version not in _VERSIONS:
                swapped = struct.unpack(">I", head[4:])[0] in _VERSIONS
                what = "big-endian" if swapped else f"of GGUF's version {version}"
                raise CheckpointError(f"the file is {what}, which is not read", path, "convert it with llama.cpp")
            tensor_count, entry_count = cursor.count(_MOST_ENTRIES), cursor.count(_MOST_ENTRIES)
            entries: dict[str, tuple[str, Any]] = {}
            for _ in range(entry_count):
                key = cursor.string(_LONGEST_STRING)
                if key in entries:
                    raise ValueError(f"the key {key[:80]!r} appears twice")
                entries[key] = cursor.value()
            infos = [cursor.tensor() for _ in range(tensor_count)]
            _, alignment = entries.get("general.alignment", ("", _ALIGNMENT))
            return GgufHeader(path, entries, _locations(path, alignment, infos, file.tell(), file_bytes))
        except ValueError as fault:
            raise CheckpointError(f"broken GGUF header: {fault}", path, "fetch it again") from None


class _Cursor:
    """Reads a header from a file of which ``left`` bytes may be read."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left

    def take(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError(f"{size:,} bytes are declared where at most {self._left:,} are left")
        self._left -= size
        taken = self._file.read(size)
        if len(taken) != size:
            raise ValueError("the file became shorter while it was read")
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int) -> int:
        count: int = self.number("Q")
        if count > most:
            raise ValueError(f"a count of {count:,}, more than {most:,}")
        return count

    def string(self, longest: int) -> str:
        try:
            return self.take(self.count(longest)).decode()
        except UnicodeDecodeError:
            raise ValueError("a text that is not UTF-8") from None

    def value(self) -> tuple[str, Any]:
        number = self.number("I")
        is_array = number == _ARRAY
        if is_array:
            number = self.number("I")
        if number not in _KIND_OF_NUMBER:
            raise ValueError(f"a value of the unknown kind {number}")
        kind, count = _KIND_OF_NUMBER[number], self.count(_MOST_ELEMENTS) if is_array else 1
        strings = number == _STRING
        values = [self.string(_LONGEST_STRING) for _ in range(count)] if strings else self._numbers(number, count)
        if is_array:
            return f"[{kind}]", values
        (value,) = values
        return kind, _shortest(value) if isinstance(value, float) and number == _FLOAT else value

    def _numbers(self, kind: int, count: int) -> list[Any]:
        code = f"<{count}{_NUMBERS[kind]}"
        data = self.take(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        if kind == _BOOL and not set(data) <= {0, 1}:
            raise ValueError("a truth value that is neither 0 nor 1")
        return list(struct.unpack(code, data))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as in the file, number of the type, offset."""
        name, dimensions = self.string(_LONGEST_NAME), self.number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.count(_LARGEST_DIMENSION) for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")


def _locations(
    path: Path,
    alignment: object,
    infos: Sequence[tuple[str, tuple[int, ...], int, int]],
    header_end: int,
    file_bytes: int,
) -> dict[str, TensorLocation]:
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r}")
    start = _aligned(header_end, alignment)
    found: dict[str, TensorLocation] = {}
    for name, shape, number, offset in infos:
        if number not in TYPES:
            raise ValueError(f"tensor {name} is of the unknown type {number}")
        type_name, values, _ = TYPES[number]
        if name in found:
            raise ValueError(f"two tensors are called {name}")
        if shape[0] % values:
            raise ValueError(f"rows of tensor {name} have {shape[0]} values, which blocks of {values} do not fill")
        begin, size = start + offset, stored_bytes(type_name, shape)
        found[name] = TensorLocation(path, type_name, shape[::-1], begin, begin + size)
    expected = end = start
    for name, location in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if location.begin != expected:
            raise ValueError(f"tensor {name} overlaps another one or leaves a gap")
        end = location.end
        expected = _aligned(end, alignment)
    if found and not end <= file_bytes <= expected:
        raise ValueError(f"{file_bytes:,} bytes where the tensors end at {end:,}")
    return found


def stored_bytes(type_name: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor."""
    values, size = BLOCKS[type_name]
    return math.prod(shape) // values * size


def write_gguf(
    file: BinaryIO,
    metadata: Metadata,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    data: Iterable[Iterable[bytes | memoryview]],
) -> str:
    """Stream a whole file; its SHA-256 is returned.

    Args:
        metadata: in the order in which it is written.
        tensors: ``(name, type, shape)``, shapes as PyTorch has them.
        data: the bytes of each tensor in that order, in portions.
    """
    declared = list(tensors)
    header = _MAGIC + struct.pack("<IQQ", _WRITTEN_VERSION, len(declared), len(metadata))
    header += b"".join(_string(key) + _value(*value) for key, value in metadata.items())
    offset, sizes = 0, []
    for name, type_name, shape in declared:
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", _NUMBER_OF_TYPE[type_name], offset)
        sizes.append(stored_bytes(type_name, shape))
        offset += _aligned(sizes[-1], _ALIGNMENT)
    digest = hashlib.sha256()

    def put(portion: bytes | memoryview) -> int:
        digest.update(portion)
        file.write(portion)
        return len(portion)

    put(header.ljust(_aligned(len(header), _ALIGNMENT), b"\0"))
    for size, portions in itertools.zip_longest(sizes, data):
        assert sum(map(put, portions)) == size, "not the bytes that the header declares"
        put(bytes(_aligned(size, _ALIGNMENT) - size))
    return digest.hexdigest()


def _value(kind: str, value: Any) -> bytes:
    if kind.startswith("["):
        number = _KINDS[kind[1:-1]]
        encoded = b"".join(map(_string, value)) if number == _STRING else _packed(number, value)
        return struct.pack("<IIQ", _ARRAY, number, len(value)) + encoded
    number = _KINDS[kind]
    return struct.pack("<I", number) + (_string(value) if number == _STRING else _packed(number, [value]))


def _packed(number: int, values: Sequence[Any]) -> bytes:
    return struct.pack(f"<{len(values)}{_NUMBERS[number]}", *values)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _shortest(value: float) -> float:
    """The decimal with the fewest digits that rounds to this number in 32 bits."""
    for digits in range(1, 10) if math.isfinite(value) else ():
        near = float(f"{value:.{digits}g}")
        with contextlib.suppress(OverflowError):
            if struct.pack("<f", near) == struct.pack("<f", value):
                return near
    return value
