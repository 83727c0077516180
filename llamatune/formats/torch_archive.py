"""PyTorch's zip format (``torch.save``): the byte range of each tensor, found without unpickling. No torch.

A tensor may be a view: ``torch.save`` writes a piece of ``torch.chunk``, or a transposed weight, as strides into the
whole storage. Views are read if their elements do not overlap, so that tensors are never larger than their file.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorLocation
from llamatune.formats.torch_pickle import BrokenError, PickledTensor, RefusedError, refused_global, walk_pickle
from llamatune.safe_reading import open_regular, stand_in
from llamatune.shapes.dtypes import ITEM_BYTES

_LARGEST_PICKLE = 4 << 20
_MAY_SHARE = ({"tok_embeddings.weight", "output.weight"}, {"model.embed_tokens.weight", "lm_head.weight"})
"""A tied head is saved as two names, or two views, of one storage; no other tensors may overlap."""


def read_archive(path: Path) -> dict[str, TensorLocation]:
    """The tensors of a ``torch.save`` file and where their bytes lie, proven to be plain and apart.

    Raises:
        CheckpointError: a legacy or raw pickle, compressed records, an opcode or global that plain tensors do not
            need (named), bytes missing or left over, elements that overlap, views that leave their storage.
    """
    with open_regular(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        head = file.read(1 << 20)
        if not head.startswith(b"PK\x03\x04"):
            raise CheckpointError(_foreign(head, file_bytes), path, "fetch it again or save it with torch.save")
        try:
            records = _records(file, file_bytes)
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise RefusedError(f"{len(pickles)} data.pkl records where one is expected")
            prefix = pickles[0].removesuffix("data.pkl")
            byteorder = records.get(f"{prefix}byteorder")
            if byteorder and _bytes_of(file, byteorder, 16) != b"little":
                raise RefusedError("big-endian tensors")
            content = walk_pickle(_bytes_of(file, records[pickles[0]], _LARGEST_PICKLE))
            entries = {name: _location(path, name, value, records, prefix) for name, value in content.items()}
        except RefusedError as fault:
            raise CheckpointError(
                f"refused: {fault}", path, "only plain tensors saved by torch.save are read"
            ) from None
        except BrokenError as fault:
            raise CheckpointError(f"broken PyTorch file: {fault}", path, "fetch it again") from None
        except (ValueError, LookupError, TypeError, struct.error, RecursionError, NotImplementedError):
            what = "broken PyTorch file: what it says of its tensors is damaged"
            raise CheckpointError(what, path, "fetch it again") from None
    _refuse_overlap(entries, path)
    return entries


def _records(file: BinaryIO, file_bytes: int) -> dict[str, tuple[int, int, int]]:
    """``(begin, end, CRC-32)`` of every record; the archive must fill the file and hold nothing compressed."""
    file.seek(max(0, file_bytes - 22))
    if file.read(4) != b"PK\x05\x06":
        raise BrokenError(
            f"the end of the archive is not at the file's end ({file_bytes:,} bytes): cut short or extended"
        )
    try:
        infos = zipfile.ZipFile(file).infolist()
    except zipfile.BadZipFile:
        raise BrokenError("the list of its records is damaged") from None
    records: dict[str, tuple[int, int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise RefusedError(
                f"record {info.filename!r} is compressed or encrypted ({info.file_size:,} bytes unpacked)"
            )
        if info.filename in records:
            raise RefusedError(f"record {info.filename!r} appears twice")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or header[8:10] != b"\0\0":
            raise BrokenError(f"record {info.filename!r} has no header of its own")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        records[info.filename] = (begin, begin + info.file_size, info.CRC)
    position = 0
    for name, (begin, end, _) in sorted(records.items(), key=lambda item: item[1]):
        if begin < position or end > file_bytes:
            raise RefusedError(f"record {name!r} overlaps another one or ends after the file's {file_bytes:,} bytes")
        position = end
    return records


def _bytes_of(file: BinaryIO, record: tuple[int, int, int], most: int) -> bytes:
    begin, end, _ = record
    if end - begin > most:
        raise RefusedError(f"a record of {end - begin:,} bytes where {most:,} are allowed")
    file.seek(begin)
    return file.read(end - begin)


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """From a view's first element to behind its last one; each dimension must step over all the finer ones."""
    if 0 in shape:
        return 0
    reach = 0
    for step, count in sorted(zip(stride, shape, strict=True)):
        if count > 1 and step <= reach:
            raise RefusedError(f"a tensor of shape {list(shape)} with strides {list(stride)}: its elements overlap")
        reach += step * (count - 1)
    return reach + 1


def _location(
    path: Path, name: str, value: Any, records: dict[str, tuple[int, int, int]], prefix: str
) -> TensorLocation:
    if not isinstance(value, PickledTensor):
        raise RefusedError(f"{name!r} is not a tensor")
    storage = value.storage
    if f"{prefix}data/{storage.key}" not in records:
        raise BrokenError(f"tensor {name} has no data record")
    begin, end, crc = records[f"{prefix}data/{storage.key}"]
    item_bytes = ITEM_BYTES[storage.dtype]
    extent = _extent(value.shape, value.stride)
    if value.offset + extent > storage.numel or storage.numel * item_bytes > end - begin:
        raise RefusedError(
            f"tensor {name} of shape {list(value.shape)} is larger than its storage of {end - begin:,} bytes"
        )
    first = begin + value.offset * item_bytes
    # A view that misses no element of its extent and has them in order is no view to its readers.
    in_order = [step for step, count in zip(value.stride, value.shape, strict=True) if count > 1]
    plain = extent == 0 or (extent == math.prod(value.shape) and in_order == sorted(in_order, reverse=True))
    strides = None if plain else value.stride
    last = first + extent * item_bytes
    whole = crc if (first, last) == (begin, end) else None
    return TensorLocation(path, storage.dtype, value.shape, first, last, strides, whole)


def _refuse_overlap(entries: dict[str, TensorLocation], path: Path) -> None:
    """Extents must be apart: all tensors together are then no larger than the file, apart from a tied head."""
    position, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position and {name, before} not in _MAY_SHARE:
            raise CheckpointError(f"refused: tensors {before} and {name} share bytes", path, "fetch it again")
        position, before = max(position, entry.end), name


def _foreign(head: bytes, file_bytes: int) -> str:
    """What a file is that is not a zip archive, with the first global that is refused, if it is a pickle."""
    if file_bytes == 0:
        return "an empty file"
    if what := stand_in(head):
        return what
    if head[:1] not in (b"\x80", b"(", b"c", b"}", b"]"):
        tar = file_bytes > 512
        return "not a PyTorch zip file (a tar or unknown format is not read)" if tar else "not a PyTorch file"
    return f"a legacy or raw pickle, which is not read because it can run code{refused_global(head)}"
