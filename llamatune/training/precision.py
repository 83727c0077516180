"""Precision: dtypes of weights, autocast and residual stream; the loss scaler of fp16."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llamatune.devices import capability_of
from llamatune.errors import EnvironmentFault
from llamatune.events import Notice, OnEvent
from llamatune.formats.state_json import BACKOFF, GROWTH, Scaler
from llamatune.model.torch_dtypes import TORCH_DTYPES
from llamatune.shapes.dtypes import PRECISIONS, QUANTIZED_DTYPES
from llamatune.shapes.gpu_advice import refusal, slower_settings
from llamatune.spec import RunSpec


def check_precision(spec: RunSpec, device: torch.device, on_event: OnEvent) -> None:
    """Raise ``EnvironmentFault`` where the device lacks the spec's bf16 or TF32; warn of fp16 on a CPU (slow)."""
    found = refusal(capability_of(device), spec.training.precision, spec.model.dtype)
    if found is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise EnvironmentFault(f"{name} has no {found.lacks}", found.where, found.todo)
    if device.type == "cpu" and spec.training.precision == "fp16":
        on_event(Notice("fp16 matrix products are very slow on a CPU; fp32 or bf16 are the quicker choices", "warning"))


def report_slower_settings(spec: RunSpec, device: torch.device, on_event: OnEvent) -> None:
    """Report what of the spec's precision and dtype is slower, or less safe, than the GPU allows."""
    capability = capability_of(device)
    if capability is not None:
        settings = spec.training.precision, spec.model.dtype
        for line in slower_settings(capability, *settings, lora=spec.adapter is not None):
            on_event(Notice(line))


def autocast_factory(
    precision: str, device: torch.device, keep_casts: bool = True
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A context for each forward pass: autocast to the precision's dtype, or nothing for fp32 and TF32.

    ``keep_casts``: a weight that is used again in the pass is not cast again.
    """
    if PRECISIONS[precision] == "float32":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, TORCH_DTYPES[PRECISIONS[precision]], cache_enabled=keep_casts)


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """With ``tf32``, have a GPU compute fp32 products in TF32 within the block, in all threads; else change nothing."""
    if precision != "tf32":
        yield
        return
    # This older of torch's two interfaces sets both; torch.compile of torch 2.10 fails where the newer one was used.
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        level = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller used the newer one
        level = "highest"
    with warnings.catch_warnings(action="ignore"):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            torch.set_float32_matmul_precision(level)
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def held_dtype(spec: RunSpec) -> torch.dtype:
    """The dtype of the frozen weights; of a quantised base that of embedding, norms and head.

    Those are bf16 (cast to fp32 for an fp32 product, so no bf16 arithmetic is asked for), and fp16 where fp16 computes.
    """
    if spec.model.dtype in QUANTIZED_DTYPES:
        return torch.float16 if spec.training.precision == "fp16" else torch.bfloat16
    return TORCH_DTYPES[spec.model.dtype]


def residual_dtype(model_dtype: torch.dtype, precision: str) -> torch.dtype:
    """The dtype of the residual stream: the weights' own where the products are computed in it too, else fp32.

    ========== ================= ================= =================
    weights    fp32, tf32        bf16              fp16
    ========== ================= ================= =================
    float32    fp32              fp32, autocast    fp32, autocast
    bfloat16   fp32, upcast      bf16              fp32, autocast
    float16    fp32, upcast      fp32, autocast    fp16
    quantised  fp32, upcast      bf16              fp16
    ========== ================= ================= =================

    'upcast': each frozen matrix is cast to fp32 for its product, one at a time, forward and backward. Of a
    quantised base the argument is the dtype of what is not quantised (``held_dtype``).
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
            self.scale, self._updates = self.scale * GROWTH, 0

    def back_off(self) -> None:
        if self.enabled:
            self.scale, self._updates = self.scale * BACKOFF, 0

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, under the names of torch's GradScaler."""
        if not self.enabled:
            return {}
        return {
            "scale": self.scale,
            "growth_factor": GROWTH,
            "backoff_factor": BACKOFF,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._updates,
        }

    def restore(self, saved: Scaler) -> None:
        """Take ``state`` back; what a run saved in another precision is no state of this scaler."""
        if self.enabled and saved.scale is not None:
            assert saved.growth_interval is not None
            assert saved.growth_tracker is not None
            self.scale, self.growth_interval = saved.scale, saved.growth_interval
            self._updates = saved.growth_tracker
