"""The files of a model directory that a run reads or copies: weights, their index, configuration, tokenizer."""

from __future__ import annotations

from pathlib import Path

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.tokenizers.chat_templates import TEMPLATE_FOLDER
from llamatune.tokenizers.copied_files import TOKENIZER_FILES

_SETTINGS = ("config.json", "params.json", "generation_config.json", *TOKENIZER_FILES)
_PATTERNS = ("*.index.json", f"{TEMPLATE_FOLDER}/*.jinja")


def base_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Each by its path relative to the directory, the small ones first; not cards and licences."""
    directory = checkpoint.path
    settings = [directory / name for name in _SETTINGS]
    settings += [path for pattern in _PATTERNS for path in sorted(directory.glob(pattern))]
    weights = sorted({part.path for parts in checkpoint.parts.values() for part in parts})
    found = [*(path for path in settings if path.is_file()), *weights]
    return {path.relative_to(directory).as_posix(): path for path in found}
