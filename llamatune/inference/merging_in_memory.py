"""Merging in memory: an adapter's updates in the weights that are computed with, matrix by matrix; no file changes."""

from __future__ import annotations

import math

from llamatune.errors import CheckpointError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.adapters.merged_layer import Survival, merged_layer
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.model.transformer import Transformer

_LEAST_SHARE = 0.99
"""Of a matrix's update that rounding has to leave, unless merging is asked for."""
_WARNED_SHARE = 0.9


def merge_in_memory(
    model: Transformer, is_asked_for: bool, where: object, on_event: OnEvent, should_stop: ShouldStop
) -> None:
    """Put a plain layer in place of every adapted one whose update survives rounding, or of every one if asked to.

    ``where`` is the adapter, for messages. A weight is freed once it is replaced, unless another model holds it.

    Raises:
        CheckpointError: a weight would not be finite, and merging is asked for.
        Stopped: ``should_stop`` said so.
    """
    paths = [path for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)]
    total, dtype = Survival(), None
    for done, path in enumerate(paths, 1):
        if should_stop():
            raise Stopped("stopped while merging", where)
        layer = model.get_submodule(path)
        assert isinstance(layer, AdaptedLinear)
        merged, survival = merged_layer(layer)
        dtype = layer.weight.dtype
        is_finite = math.isfinite(survival.share)
        if is_asked_for and not is_finite:
            what = f"{path}.weight would hold NaN or infinity, or does so"
            raise CheckpointError(what, where, "leave out --merge on, or choose another --dtype")
        if is_asked_for or (is_finite and survival.share >= _LEAST_SHARE):
            model.set_submodule(path, merged)
        total += survival
        on_event(Progress("merging", done, len(paths)))
    if dtype is not None and is_asked_for and total.share < _WARNED_SHARE:
        share = f"{max(0.0, total.share):.0%} of the adapter's update is left in the merged weights"
        what = f"rounded to {DTYPE_NAMES[dtype]}, {share}"
        on_event(Notice(f"{what}: --merge off, or --dtype float32, keeps it", "warning"))
