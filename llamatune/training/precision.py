"""Precision: dtypes of weights, autocast and residual stream; the loss scaler of fp16."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llamatune.devices import lacks_bf16
from llamatune.errors import EnvironmentFault
from llamatune.events import Notice, OnEvent
from llamatune.model.torch_dtypes import TORCH_DTYPES
from llamatune.shapes.dtypes import PRECISIONS
from llamatune.spec import RunSpec

_GROWTH, _BACKOFF = 2.0, 0.5


def check_precision(spec: RunSpec, device: torch.device, on_event: OnEvent) -> None:
    """Raise ``EnvironmentFault`` where the spec uses bf16 and the device has none; warn of fp16 on a CPU (slow)."""
    if "bfloat16" in (spec.model.dtype, PRECISIONS[spec.training.precision]) and lacks_bf16(device):
        raise EnvironmentFault(
            f"{torch.cuda.get_device_name(device)} has no bf16",
            None,
            "set training.precision: fp16 and model.dtype: float16 or nf4",
        )
    if device.type == "cpu" and spec.training.precision == "fp16":
        on_event(Notice("fp16 matrix products are very slow on a CPU; fp32 or bf16 are the quicker choices", "warning"))


def autocast_factory(
    precision: str, device: torch.device, keep_casts: bool = True
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A context for each forward pass: autocast to the precision's dtype, or nothing for fp32.

    ``keep_casts``: a weight that is used again in the pass is not cast again.
    """
    if precision == "fp32":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, TORCH_DTYPES[PRECISIONS[precision]], cache_enabled=keep_casts)


def held_dtype(spec: RunSpec) -> torch.dtype:
    """The dtype of the frozen weights; with NF4 that of embedding, norms and head, which are not quantised.

    Those are bf16 (cast to fp32 for an fp32 product, so no bf16 arithmetic is asked for), and fp16 where fp16 computes.
    """
    if spec.model.dtype == "nf4":
        return torch.float16 if spec.training.precision == "fp16" else torch.bfloat16
    return TORCH_DTYPES[spec.model.dtype]


def residual_dtype(model_dtype: torch.dtype, precision: str) -> torch.dtype:
    """The dtype of the residual stream: the weights' own where the products are computed in it too, else fp32.

    ========== ================= ================= =================
    weights    fp32              bf16              fp16
    ========== ================= ================= =================
    float32    fp32              fp32, autocast    fp32, autocast
    bfloat16   fp32, upcast      bf16              fp32, autocast
    float16    fp32, upcast      fp32, autocast    fp16
    nf4        fp32, upcast      bf16              fp16
    ========== ================= ================= =================

    'upcast': each frozen matrix is cast to fp32 for its product, one at a time, forward and backward. With ``nf4`` the
    argument is the dtype of what is not quantised (``held_dtype``).
    """
    return model_dtype if TORCH_DTYPES[PRECISIONS[precision]] == model_dtype else torch.float32


class LossScaler:
    """Loss scaling: the loss is multiplied so that small gradients do not underflow in fp16 (Micikevicius et al. 2018).

    An overflow halves the scale, 2,000 updates in a row without one double it. It is 1 where scaling is not enabled.
    """

    def __init__(self, enabled: bool, scale: float = 65536.0, growth_interval: int = 2000) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = scale if enabled else 1.0
        self._updates = 0

    def unscale(self, gradients: list[Tensor]) -> None:
        if self.enabled:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def grow(self) -> None:
        """Count an update; double the scale after ``growth_interval`` in a row."""
        self._updates += 1
        if self.enabled and self._updates == self.growth_interval:
            self.scale, self._updates = self.scale * _GROWTH, 0

    def back_off(self) -> None:
        if self.enabled:
            self.scale, self._updates = self.scale * _BACKOFF, 0

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, under the names of torch's GradScaler."""
        if not self.enabled:
            return {}
        return {
            "scale": self.scale,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self.scale, self.growth_interval = state["scale"], state["growth_interval"]
            self._updates = state["_growth_tracker"]
