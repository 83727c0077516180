"""What a format cannot hold of a model: refused by name before anything is written, or told where it is no computation.

The configuration is written and read back: what comes back must compute the same.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch

from llamatune.checkpoints.gguf_config import (
    config_metadata,
    gguf_name,
    read_gguf_config,
    rope_factors,
)
from llamatune.checkpoints.params_json import read_params_json, write_params_json
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.model.rope import rotary_angles
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.chat_templates import read_chat_templates
from llamatune.tokenizers.loading import load_tokenizer, tokenizer_file

_COMPUTED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "sliding_window", "biased_modules", "head_norms",
)  # fmt: skip
"""What decides the computation, beside rope, whose angles are compared."""
_POSITIONS = (1, 7, 100, 5000)


def refuse_what_gguf_lacks(config: LlamaConfig, path: Path, on_event: OnEvent) -> None:
    """Raise ``CheckpointError`` for a model that llama.cpp does not compute, or that its file cannot state."""
    try:
        metadata = {key: value for key, (_, value) in config_metadata(config).items()}
        shapes = {gguf_name(name): shape for name, shape in config.parameter_shapes()}
        read = read_gguf_config(metadata, shapes, rope_factors(config), path)
    except CheckpointError as fault:
        raise CheckpointError(f"a GGUF file cannot hold it: {fault.what}", path, fault.todo) from None
    _refuse_change(config, read, "GGUF", path)
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        what = f"llama.cpp does not apply its sliding window: texts beyond {window} tokens are computed in another way"
        on_event(Notice(f"{path}: {what}", "warning"))


def refuse_what_meta_lacks(config: LlamaConfig) -> None:
    """Raise ``CheckpointError`` for a model that ``params.json`` cannot state."""
    with tempfile.TemporaryDirectory(prefix="llamatune-") as made:
        directory = Path(made)
        write_params_json(directory, config)
        read = read_params_json(directory, None)
    _refuse_change(config, read, "Meta's format", Path("params.json"))


def _refuse_change(config: LlamaConfig, read: LlamaConfig, format_: str, path: Path) -> None:
    for name in _COMPUTED:
        ours, theirs = getattr(config, name), getattr(read, name)
        near = isinstance(ours, float) and abs(ours - theirs) <= 1e-6 * abs(ours)
        if ours != theirs and not near:
            what = f"{name} is {ours!r}, of which {format_} would make {theirs!r}"
            raise CheckpointError(what, path, "choose --format hf")
    positions = torch.tensor([_POSITIONS])
    angles = [rotary_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling) for c in (config, read)]
    if not all(torch.allclose(ours, theirs, atol=1e-2) for ours, theirs in zip(*angles, strict=True)):
        raise CheckpointError(f"{format_} would change its rotary angles", path, "choose --format hf")


def warn_of_lost_tokens(source: Path, made: Path, output: Path, on_event: OnEvent) -> None:
    """Notices where the files of a tokenizer that were written lack tokens of the source's, or its chat template."""
    if read_chat_templates(source) and not read_chat_templates(made):
        on_event(Notice(f"{output}: Meta's format has no place for the chat template, which is left out", "warning"))
    if tokenizer_file(source) is None or tokenizer_file(made) is None:
        return
    try:
        before, after = load_tokenizer(source).pieces(), load_tokenizer(made).pieces()
    except CheckpointError as fault:
        on_event(Notice(f"{output}: its tokenizer cannot be opened: {fault.what}", "warning"))
        return
    pairs = itertools.zip_longest(before, after[: len(before)])
    if lost := [piece for piece, other in pairs if piece and piece != other]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        on_event(Notice(f"{output}: Meta's tokenizer.model has no place for {lost[0][:40]!r}{more}", "warning"))
