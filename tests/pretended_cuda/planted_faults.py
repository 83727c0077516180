"""Faults that a GPU would show and a CPU does not, planted into the package to show that they are found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llamatune.inference import captured_steps
from llamatune.model import attention
from llamatune.shapes.attention_kernels import Kernel
from llamatune.training import window_gradients
from llamatune.training.precision import LossScaler


def _after_each_pass(read: Callable[[Tensor], object]) -> Any:
    """Do something to the summed loss of each pass."""
    backward = window_gradients._backward

    def run(*args: Any) -> Tensor:
        loss = backward(*args)
        read(loss)
        return loss

    return mock.patch.object(window_gradients, "_backward", run)


def _mask_of_the_cpu() -> Any:
    attend = attention._attend

    def run(q: Tensor, k: Tensor, v: Tensor, kind: str = "causal", mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, "given", torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())

    return mock.patch.object(attention, "_attend", run)


def _finite_check_of_its_own() -> Any:
    unscale = LossScaler.unscale

    def run(scaler: LossScaler, gradients: list[Tensor]) -> None:
        assert all(bool(gradient.isfinite().all()) for gradient in gradients[:1])
        unscale(scaler, gradients)

    return mock.patch.object(LossScaler, "unscale", run)


FAULTS: dict[str, Callable[[], Any]] = {
    "a mask made on the CPU": _mask_of_the_cpu,
    ".item() of each pass": lambda: _after_each_pass(lambda loss: loss.item()),
    ".cpu() of each pass": lambda: _after_each_pass(lambda loss: loss.cpu()),
    "a comparison of each pass": lambda: _after_each_pass(lambda loss: bool(loss > 3)),
    "nonzero of each pass": lambda: _after_each_pass(lambda loss: loss[None].nonzero()),
    "a blocking copy to the device in each pass": lambda: _after_each_pass(lambda loss: torch.zeros(3).to(loss.device)),
    "a finite check of its own": _finite_check_of_its_own,
    "cuDNN attention": lambda: mock.patch.object(torch.backends.cuda, "enable_cudnn_sdp"),
    "grouped heads in math attention": lambda: mock.patch.object(attention, "choose_kernel", return_value=Kernel.SDPA),
}


def _in_each_step(read: Callable[[Tensor], object]) -> Any:
    """Do something to the logits of each step."""
    last_logits = captured_steps.last_logits

    def run(*args: Any) -> Tensor:
        logits = last_logits(*args)
        read(logits)
        return logits

    return mock.patch.object(captured_steps, "last_logits", run)


STEP_FAULTS: dict[str, Callable[[], Any]] = {
    ".item() of each step": lambda: _in_each_step(lambda logits: logits[0, 0].item()),
    "a tensor of the host in each step": lambda: _in_each_step(
        lambda logits: torch.zeros(3).to(logits.device, non_blocking=True)
    ),
}
"""Of captured steps of decoding."""


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """The package with one of ``FAULTS`` or ``STEP_FAULTS`` in it; None: as it is."""
    with {**FAULTS, **STEP_FAULTS}[name]() if name else contextlib.nullcontext():
        yield
