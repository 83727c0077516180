"""Copies what a merge leaves as it is while torch is still being imported, which takes seconds. No torch.

It only saves time: the merge checks everything, and copies itself what it finds at another place than it needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from llamatune.checkpoints.adapter_header import adapted_modules, is_update_in_block, read_adapter_header
from llamatune.checkpoints.config_json import HEAD
from llamatune.checkpoints.huggingface_files import files_of, locate_huggingface, shard_names
from llamatune.checkpoints.model_directory import detect_format
from llamatune.command_options.inference import MergeOptions
from llamatune.durable_writing import refuse_small_disk
from llamatune.errors import LlamatuneError
from llamatune.formats.begun_files import BegunFile, Copies, copying_ahead
from llamatune.formats.file_range import FileRange
from llamatune.formats.safetensors import METADATA, TensorLocation, header_of
from llamatune.shapes.dtypes import DTYPES, WEIGHT_DTYPES
from llamatune.strict_json import read_json

_LEAST_BYTES = 64 << 20
"""Less is copied in no time."""
_WEIGHTS = frozenset(dtype.stored for dtype in DTYPES if dtype.name in WEIGHT_DTYPES)


@contextlib.contextmanager
def copying_ahead_of_merge(options: MergeOptions) -> Iterator[Mapping[str, BegunFile]]:
    """The files of the merged model that are begun, by name; copying goes on until the block ends."""
    output, planned = Path(os.path.realpath(options.output)), dict[str, Copies]()
    with contextlib.suppress(LlamatuneError, OSError):  # which the merge meets too
        if "torch" not in sys.modules and not output.exists():
            planned = _plan(options)
    with copying_ahead(next(place for place in output.parents if place.exists()), planned) as begun:
        yield begun


def _plan(options: MergeOptions) -> dict[str, Copies]:
    """What the merged model's files hold of the base's, where it has the base's layout; nothing where it may not."""
    as_it_is = options.dtype == "same" and not options.onto_quantized and options.probe is None
    if not as_it_is or options.format == "meta" or detect_format(options.model) != "hf":
        return {}
    tensors = locate_huggingface(options.model, variant=options.variant)
    if HEAD in tensors and read_json(options.model / "config.json").get("tie_word_embeddings"):
        return {}
    updates = [name for adapter in options.adapters for name in read_adapter_header(adapter).tensors]
    size = sum(part.end - part.begin for part in tensors.values())
    is_plain = all(part.strides is None and part.dtype in _WEIGHTS for part in tensors.values())
    if size < _LEAST_BYTES or not is_plain or not all(map(is_update_in_block, updates)):
        return {}
    refuse_small_disk(options.output, size, "the merged model")
    changed = {f"{module}.weight" for module in adapted_modules(updates)}
    files = files_of(tensors)
    return {name: dict(_copies(file, changed)) for name, file in zip(shard_names(len(files)), files, strict=True)}


def _copies(file: list[tuple[str, TensorLocation]], changed: set[str]) -> Iterator[tuple[int, FileRange]]:
    header, _ = header_of([(name, part.dtype, part.shape) for name, part in file], METADATA)
    position = len(header)
    for name, part in file:
        if name not in changed:
            yield position, FileRange(part.path, part.begin, part.end, part.crc)
        position += part.end - part.begin
