"""A model directory: its format, its configuration, and the file and bytes of each tensor. No torch.

Of weights, only headers are read.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Literal

from llamatune.checkpoints.config_json import EMBEDDING, read_config_json
from llamatune.checkpoints.huggingface_files import has_huggingface_weights, locate_huggingface
from llamatune.checkpoints.params_json import HEAD, read_params_json
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.gguf import SUFFIX
from llamatune.formats.safetensors import TensorLocation
from llamatune.formats.torch_archive import read_archive
from llamatune.shapes.dtypes import DTYPES, WEIGHT_DTYPES
from llamatune.shapes.llama_config import LlamaConfig

Format = Literal["hf", "meta", "gguf"]
_CONFIGURATIONS: dict[Format, str] = {"hf": "config.json", "meta": "params.json"}
_CONVERT = "make a model directory of it with llamatune convert"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_META_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")


def detect_format(path: Path) -> Format:
    """Whether a model directory is Hugging Face's or Meta's."""
    if not _is_there(path):
        raise CheckpointError("no such model directory", path, _how_to_fetch(str(path)))
    if path.suffix == SUFFIX:
        raise CheckpointError("a GGUF file, not a model directory", path, _CONVERT)
    if not path.is_dir():
        raise CheckpointError("a file where a model directory is expected", path, f"did you mean {path.parent}?")
    formats = [format_ for format_, file in _CONFIGURATIONS.items() if _is_there(path / file)]
    if len(formats) == 2:
        formats = [name for name in formats if has_weights(path, name)] or formats
    if formats:
        return formats[0]
    if (path / "adapter_config.json").exists():
        raise CheckpointError("an adapter, not a model", path, "give the base as --model and this as --adapter")
    if any(path.glob(f"*{SUFFIX}")):
        raise CheckpointError("only a GGUF file is in it", path, _CONVERT)
    raise CheckpointError(
        "neither config.json (Hugging Face) nor params.json (Meta) is in it", path, "give a LLaMA model directory"
    )


def _how_to_fetch(path: str) -> str | None:
    """What to do where a name of the Hugging Face Hub is given: nothing is downloaded."""
    if not _HUB_NAME.fullmatch(path):
        return None
    return f"if this is a model of the Hugging Face Hub: hf download {path} --local-dir DIR, then give DIR"


def _is_there(path: Path) -> bool:
    """Whether ``path`` exists; an ``EnvironmentFault`` if that cannot be known."""
    try:
        os.stat(path)
    except OSError as fault:
        if fault.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None
    return True


def read_config(path: Path, on_event: OnEvent = ignore_event, variant: str | None = None) -> LlamaConfig:
    """The configuration of the model in ``path``; of weights, where there are any, only headers are read."""
    if detect_format(path) == "hf":
        tensors = (
            locate_huggingface(path, on_event, variant) if variant is not None or has_weights(path, "hf") else None
        )
        return read_config_json(path, tensors, on_event)
    refuse_variant(path, variant)
    return read_params_json(path, locate_meta(path) if has_weights(path, "meta") else None)


def stored_dtype(path: Path, variant: str | None = None) -> str | None:
    """What the embedding is stored in, by our names (fp32 if in fp64); None: there are no weights."""
    format_ = detect_format(path)
    if not has_weights(path, format_):
        return None
    if format_ == "hf":
        stored = locate_huggingface(path, ignore_event, variant)[EMBEDDING].dtype
    else:
        stored = locate_meta(path)[0]["tok_embeddings.weight"].dtype
    named = {dtype.stored: dtype.name for dtype in DTYPES if dtype.name in WEIGHT_DTYPES}
    return named.get(stored, "float32")


def warn_of_missing_head(path: Path, format_: Format, config: LlamaConfig, on_event: OnEvent) -> None:
    """A notice about a Meta model without a head: it may be tied, or its head may have been lost.

    Meta's format has no flag that says which. Its own files hold the head of a tied model too.
    """
    if format_ == "meta" and config.tie_word_embeddings:
        what = f"no {HEAD} in the weights; the embedding serves as the head (right only for a tied model)"
        on_event(Notice(f"{path}: {what}", "warning"))


def refuse_variant(path: Path, variant: str | None) -> None:
    """Raise ``CheckpointError`` for a variant of a model in Meta's format."""
    if variant is not None:
        what = f"no variant {variant!r} of the weights: Meta's format has none"
        raise CheckpointError(what, path, "leave --variant out (of a run: model.variant)")


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
        return has_huggingface_weights(directory)
    return any(_META_SHARD.fullmatch(p.name) for p in directory.iterdir())
