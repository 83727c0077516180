"""A model directory's format, Hugging Face's or Meta's, and its configuration. No torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from llamatune.checkpoints.config_json import read_config_json
from llamatune.checkpoints.params_json import HEAD, read_params_json
from llamatune.checkpoints.tensor_locations import has_weights, locate_huggingface, locate_meta
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import Notice, OnEvent
from llamatune.shapes.config import LlamaConfig

Format = Literal["hf", "meta"]
_CONFIGURATIONS: dict[Format, str] = {"hf": "config.json", "meta": "params.json"}


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
