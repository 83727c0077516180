"""A base of random weights that is drawn on the device, once a process, and shared by all models made there.

A directory with a ``config.json`` and no weights stands for it. Frozen weights are the same tensors in every model, so
two sides of a comparison hold them once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from llamatune.checkpoints.adapter import Adapter, load_adapter
from llamatune.model.initialise import drawn_weights
from llamatune.model.transformer import Transformer
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.training import inputs, model_and_optimizer

_SEED = 7


def is_drawn(directory: Path) -> bool:
    """Whether a base directory holds no weights."""
    return not any(directory.glob("*.safetensors"))


@functools.lru_cache(maxsize=1)
def drawn_base(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, from N(0, 0.02²), norms 1; the last base that was drawn is kept."""
    return {name: drawn.to(dtype) for name, drawn in _draw(config, device)}


def forget_base() -> None:
    """Free the base that is kept, unless a model holds it."""
    drawn_base.cache_clear()


def start_of(values: dict[str, Any]) -> tuple[dict[str, Any], Adapter | None]:
    """A run spec's values without the adapter to start from, which no random base allows, and that adapter."""
    lora = dict(values["lora"])
    start = lora.pop("init_from", None)
    if values["model"].get("init") != "random" or start is None:
        return values, None
    return {**values, "lora": lora}, load_adapter(Path(start))


@contextlib.contextmanager
def drawing_on_device(
    device: torch.device | str, shared: torch.dtype | None = None, start: Adapter | None = None
) -> Iterator[None]:
    """Within the block llamatune draws random bases on ``device``; a base in ``shared`` is that of ``drawn_base``.

    Otherwise the same weights are drawn one after another, as for a quantised base. Runs begin with ``start``.
    """
    where = torch.device(device if str(device) != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

    def draw(model: Transformer, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:
        if shared is None:
            return _draw(model.config, where)
        return iter(drawn_base(model.config, shared, where).items())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(model_and_optimizer, "drawn_weights", draw))
        if start is not None:
            stack.enter_context(mock.patch.object(inputs, "_starting_adapter", return_value=start))
        yield


def _draw(config: LlamaConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model: nn.Module = Transformer(config)
    return drawn_weights(model, _SEED, device=device)
