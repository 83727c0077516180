"""Copies what a merge or a conversion leaves as it is while torch is being imported, which takes seconds. No torch.

It only saves time: the verb checks everything, and copies itself what it finds at another place than it needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from llamatune.checkpoints.adapter_header import adapted_modules, is_update_in_block, read_adapter_header
from llamatune.checkpoints.config_json import HEAD, read_config_json
from llamatune.checkpoints.huggingface_files import files_of, locate_huggingface, plan_shards, shard_names
from llamatune.checkpoints.model_directory import detect_format
from llamatune.command_options.conversion import ConvertOptions
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
_Files = Sequence[Sequence[tuple[str, TensorLocation]]]


@contextlib.contextmanager
def copying_while_importing(options: MergeOptions | ConvertOptions) -> Iterator[Mapping[str, BegunFile]]:
    """The files of weights that are begun, by name; copying goes on until the block ends."""
    output, planned = Path(os.path.realpath(options.output)), dict[str, Copies]()
    with contextlib.suppress(LlamatuneError, OSError):  # which the verb meets too
        if "torch" not in sys.modules and not output.exists():
            planned = _plan_merge(options) if isinstance(options, MergeOptions) else _plan_conversion(options)
    with copying_ahead(next(place for place in output.parents if place.exists()), planned) as begun:
        yield begun


def _plan_merge(options: MergeOptions) -> dict[str, Copies]:
    """What the merged model's files hold of the base's, where it has the base's layout; nothing where it may not."""
    tensors = _copyable(options)
    if not tensors:
        return {}
    updates = [name for adapter in options.adapters for name in read_adapter_header(adapter).tensors]
    is_other = options.format == "meta" or options.onto_quantized or options.probe is not None
    if is_other or not all(map(is_update_in_block, updates)):
        return {}
    return _plan(files_of(tensors), {f"{module}.weight" for module in adapted_modules(updates)})


def _plan_conversion(options: ConvertOptions) -> dict[str, Copies]:
    """All, in new shards."""
    tensors = _copyable(options)
    if options.target != "hf" or not tensors:
        return {}
    names = [name for name, _ in read_config_json(options.model, tensors).parameter_shapes() if name in tensors]
    sizes = {name: tensors[name].end - tensors[name].begin for name in names}
    shards = plan_shards(sizes, options.shards, options.shard_bytes)
    return _plan([[(name, tensors[name]) for name in shard] for shard in shards])


def _copyable(options: MergeOptions | ConvertOptions) -> dict[str, TensorLocation]:
    """The model's tensors if they are large, Hugging Face's, and written as they are stored; else none."""
    if options.dtype != "same" or detect_format(options.model) != "hf":
        return {}
    tensors = locate_huggingface(options.model, variant=options.variant)
    if HEAD in tensors and read_json(options.model / "config.json").get("tie_word_embeddings"):
        return {}  # it may be left out
    size = sum(part.end - part.begin for part in tensors.values())
    if size < _LEAST_BYTES or any(part.strides is not None or part.dtype not in _WEIGHTS for part in tensors.values()):
        return {}
    refuse_small_disk(options.output, 2 * size, "the model")  # the verb asks again, when some of it is copied
    return tensors


def _plan(files: _Files, changed: Collection[str] = ()) -> dict[str, Copies]:
    """Where the bytes of all other tensors than those that change come to lie."""
    names = shard_names(len(files))
    return {name: dict(_copies(file, changed)) for name, file in zip(names, files, strict=True)}


def _copies(file: Sequence[tuple[str, TensorLocation]], changed: Collection[str]) -> Iterator[tuple[int, FileRange]]:
    header, _ = header_of([(name, part.dtype, part.shape) for name, part in file], METADATA)
    position = len(header)
    for name, part in file:
        if name not in changed:
            yield position, FileRange(part.path, part.begin, part.end, part.crc)
        position += part.end - part.begin
