"""A model directory: its format, its configuration, and the file and bytes of each tensor. No torch.

Of weights, only headers are read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from llamatune.checkpoints.config_json import read_config_json
from llamatune.checkpoints.params_json import HEAD, read_params_json
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import Notice, OnEvent
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.formats.torch_archive import read_archive
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import read_json

Format = Literal["hf", "meta"]
_CONFIGURATIONS: dict[Format, str] = {"hf": "config.json", "meta": "params.json"}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 16 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_META_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")


def detect_format(path: Path) -> Format:
    """Whether a model directory is Hugging Face's or Meta's."""
    if not _is_there(path):
        raise CheckpointError("no such model directory", path)
    if not path.is_dir():
        raise CheckpointError("a file where a model directory is expected", path, f"did you mean {path.parent}?")
    formats = [format_ for format_, file in _CONFIGURATIONS.items() if _is_there(path / file)]
    if len(formats) == 2:
        formats = [name for name in formats if has_weights(path, name)] or formats
    if formats:
        return formats[0]
    if (path / "adapter_config.json").exists():
        raise CheckpointError("an adapter, not a model", path, "give the base as --model and this as --adapter")
    raise CheckpointError(
        "neither config.json (Hugging Face) nor params.json (Meta) is in it", path, "give a LLaMA model directory"
    )


def _is_there(path: Path) -> bool:
    """Whether ``path`` exists; an ``EnvironmentFault`` if that cannot be known."""
    try:
        os.stat(path)
    except OSError as fault:
        if fault.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None
    return True


def read_config(path: Path) -> LlamaConfig:
    """The configuration of the model in ``path``; of weights, where there are any, only headers are read."""
    if detect_format(path) == "hf":
        return read_config_json(path, locate_huggingface(path) if has_weights(path, "hf") else None)
    return read_params_json(path, locate_meta(path) if has_weights(path, "meta") else None)


def warn_of_missing_head(path: Path, format_: Format, config: LlamaConfig, on_event: OnEvent) -> None:
    """A notice about a Meta model without a head: it may be tied, or its head may have been lost.

    Meta's format has no flag that says which. Its own files hold the head of a tied model too.
    """
    if format_ == "meta" and config.tie_word_embeddings:
        what = f"no {HEAD} in the weights; the embedding serves as the head (right only for a tied model)"
        on_event(Notice(f"{path}: {what}", "warning"))


def list_faults(faults: Mapping[str, Sequence[str]]) -> str:
    """``missing: a, b; unexpected: c`` for the faults that have names, the first five of each."""
    return "; ".join(
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in faults.items()
        if names
    )


def locate_huggingface(directory: Path) -> dict[str, TensorLocation]:
    """The tensors of ``model.safetensors``, or of the shards that its index names.

    Raises:
        CheckpointError: no weights, weights of another kind, a shard outside the directory, an index that disagrees
            with its shards, a broken file.
    """
    single = directory / SINGLE_FILE
    if os.path.lexists(single):
        return read_header(single)[0]
    index = directory / INDEX_FILE
    if not os.path.lexists(index):
        raise _no_weights(directory)
    weight_map = read_json(index, max_bytes=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", index, "fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"unsafe shard name {shard!r} for {name}", index, "a shard is a plain file name")
    tensors: dict[str, TensorLocation] = {}
    unlisted, twice = [], []
    for shard in sorted(set(weight_map.values())):
        stored = read_header(directory / shard)[0]
        tensors |= {name: location for name, location in stored.items() if weight_map.get(name) == shard}
        unlisted += [name for name in stored if name not in weight_map]
        twice += [name for name in stored if weight_map.get(name, shard) != shard]
    absent = weight_map.keys() - tensors.keys()
    faults = {"not in its shard": absent, "not in the index": unlisted, "stored twice": twice}
    if listed := list_faults({what: sorted(names) for what, names in faults.items()}):
        raise CheckpointError(f"the index disagrees with the shards ({listed})", index, "fetch them again")
    return tensors


def locate_meta(directory: Path) -> list[dict[str, TensorLocation]]:
    """The tensors of each ``consolidated.XX.pth``, in the order of the shards and under Meta's names."""
    numbers = sorted(int(m[1]) for p in directory.iterdir() if (m := _META_SHARD.fullmatch(p.name)))
    if not numbers:
        raise CheckpointError("no weights (consolidated.00.pth)", directory, "fetch the weights beside params.json")
    if numbers != list(range(len(numbers))):
        missing = next(n for n in range(len(numbers) + 1) if n not in numbers)
        raise CheckpointError(f"consolidated.{missing:02d}.pth is missing", directory, "fetch all shards")
    return [read_archive(directory / f"consolidated.{n:02d}.pth") for n in numbers]


def has_weights(directory: Path, format_: str) -> bool:
    """Whether there are weights at all: a configuration alone is enough to count or to draw random weights."""
    if format_ == "hf":
        return any(os.path.lexists(directory / name) for name in (SINGLE_FILE, INDEX_FILE))
    return any(_META_SHARD.fullmatch(p.name) for p in directory.iterdir())


def _no_weights(directory: Path) -> CheckpointError:
    what, todo = f"no weights ({SINGLE_FILE} or {INDEX_FILE})", "fetch the weights beside config.json"
    if any(directory.glob("*.bin")):
        what = "only pytorch_model.bin weights, which are not read: they are pickles and can run code"
        todo = "fetch the safetensors files, or convert with transformers' save_pretrained"
    elif any(directory.glob("*.safetensors")):
        what, todo = f"safetensors files but no {INDEX_FILE}", "fetch the index too"
    return CheckpointError(what, directory, todo)
