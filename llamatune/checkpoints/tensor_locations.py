"""Which tensors a model directory stores, and the file and bytes of each. Only headers are read. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorEntry, read_header
from llamatune.formats.torch_archive import read_archive
from llamatune.safe_reading import open_regular
from llamatune.shapes.dtypes import ITEM_BYTES
from llamatune.strict_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 16 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_META_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")


@dataclass(frozen=True)
class TensorLocation:
    """One tensor, or one shard's part of it, as it is stored in ``path``."""

    path: Path
    entry: TensorEntry
    strides: tuple[int, ...] | None = None
    """In elements, of a view that does not fill ``entry.begin:entry.end`` in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this part, not of the joined tensor."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """The safetensors name, such as ``BF16``."""
        return self.entry.dtype

    @property
    def rows_are_whole(self) -> bool:
        """Whether each row of the matrix is one run of bytes: not so where a view is transposed."""
        return self.strides is None or self.shape[1:] in ((), (1,)) or self.strides[1:] == (1,)

    def row_bytes(self, rows: Iterable[int]) -> bytes:
        """The bytes of some rows of a matrix (of elements of a vector), one after the other."""
        size = ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])
        step = size if self.strides is None else ITEM_BYTES[self.dtype] * self.strides[0]
        assert self.rows_are_whole
        with open_regular(self.path) as file:
            parts = []
            for row in rows:
                file.seek(self.entry.begin + row * step)
                parts.append(file.read(size))
        return b"".join(parts)


def listed(names: list[str], most: int = 5) -> str:
    """``names`` in one line, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def locate_huggingface(directory: Path) -> dict[str, TensorLocation]:
    """The tensors of ``model.safetensors``, or of the shards that its index names.

    Raises:
        CheckpointError: no weights, weights of another kind, a shard outside the directory, an index that disagrees
            with its shards, a broken file.
    """
    single = directory / SINGLE_FILE
    if _present(single):
        return {name: TensorLocation(single, entry) for name, entry in read_header(single)[0].items()}
    index = directory / INDEX_FILE
    if not _present(index):
        raise CheckpointError(*_no_weights(directory))
    weight_map = read_json(index, max_bytes=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", index, "fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"unsafe shard name {shard!r} for {name}", index, "a shard is a plain file name")
    tensors: dict[str, TensorLocation] = {}
    unlisted, twice = [], []
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(directory / shard)[0].items():
            if weight_map.get(name) == shard:
                tensors[name] = TensorLocation(directory / shard, entry)
            elif name in weight_map:
                twice.append(name)
            else:
                unlisted.append(name)
    absent = [name for name in weight_map if name not in tensors]
    if unlisted or absent or twice:
        faults = [
            f"{what} {listed(sorted(names))}"
            for what, names in (
                ("not in its shard:", absent),
                ("not in the index:", unlisted),
                ("stored twice:", twice),
            )
            if names
        ]
        raise CheckpointError(f"the index disagrees with the shards ({'; '.join(faults)})", index, "fetch them again")
    return tensors


def locate_meta(directory: Path) -> list[dict[str, TensorLocation]]:
    """The tensors of each ``consolidated.XX.pth``, in the order of the shards and under Meta's names."""
    numbers = sorted(int(m[1]) for p in directory.iterdir() if (m := _META_SHARD.fullmatch(p.name)))
    if not numbers:
        raise CheckpointError("no weights (consolidated.00.pth)", directory, "fetch the weights beside params.json")
    if numbers != list(range(len(numbers))):
        missing = next(n for n in range(len(numbers) + 1) if n not in numbers)
        raise CheckpointError(f"consolidated.{missing:02d}.pth is missing", directory, "fetch all shards")
    shards = [directory / f"consolidated.{n:02d}.pth" for n in numbers]
    return [{name: TensorLocation(path, e, e.strides) for name, e in read_archive(path).items()} for path in shards]


def has_weights(directory: Path, format_: str) -> bool:
    """Whether there are weights at all: a configuration alone is enough to count or to draw random weights."""
    if format_ == "hf":
        return _present(directory / SINGLE_FILE) or _present(directory / INDEX_FILE)
    return any(_META_SHARD.fullmatch(p.name) for p in directory.iterdir())


def same_bytes(one: TensorLocation, other: TensorLocation) -> bool:
    """Whether two tensors hold the same bytes; reads no further than the first difference."""
    assert one.strides is None, "safetensors has no views"
    assert other.strides is None
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left = one.entry.end - one.entry.begin
    with open_regular(one.path) as a, open_regular(other.path) as b:
        a.seek(one.entry.begin)
        b.seek(other.entry.begin)
        while left > 0:
            portion = min(left, 1 << 20)
            if a.read(portion) != b.read(portion):
                return False
            left -= portion
    return True


def _present(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _no_weights(directory: Path) -> tuple[str, Path, str]:
    if any(directory.glob("*.bin")):
        return (
            "only pytorch_model.bin weights, which are not read: they are pickles and can run code",
            directory,
            "fetch the safetensors files, or convert with transformers' save_pretrained",
        )
    if any(directory.glob("*.safetensors")):
        return f"safetensors files but no {INDEX_FILE}", directory, "fetch the index too"
    return f"no weights ({SINGLE_FILE} or {INDEX_FILE})", directory, "fetch the weights beside config.json"
