"""Steps of one spec on two devices, and how far apart their results may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run_tools import make_spec
from torch import Tensor

from llamatune.checkpoints.loading import open_checkpoint
from llamatune.data.batches import Batch, open_prepared
from llamatune.events import ignore_event, never_stop
from llamatune.model.compiled_functions import compiling
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.ranks import ALONE
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.gradient_lanes import LANES
from llamatune.spec import RunSpec
from llamatune.training.determinism import deterministic_kernels
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.passes import PassRule
from llamatune.training.precision import fp32_products
from llamatune.training.schedule import Schedule
from llamatune.training.stopping import Stopping
from llamatune.training.training_step import make_update
from llamatune.training.window_gradients import window_gradients

CPU = torch.device("cpu")
ALL_SEVEN = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}

ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""The largest relative error of one rounding; TF32 rounds what goes into a product."""
_ROUNDINGS = 3 * 2 * 12
"""One after another from the embedding through three layers of about twelve operations, and back again."""
_SPREAD = 6.0
"""Errors add like steps of a random walk; the worst of many tensors may be so many standard deviations away."""
_TERMS = 131
"""The longest sum of a product (the vocabulary's); devices add in other orders, in fp32."""


def tolerance(precision: str) -> float:
    """The largest relative error of a loss, a gradient (its norm) or an update against fp32 on the CPU."""
    walk = _SPREAD * math.sqrt(_ROUNDINGS)
    return walk * (ROUNDOFF[precision] + math.sqrt(_TERMS) * ROUNDOFF["fp32"])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, both norms over all elements."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Result:
    """Loss, gradients and changes of the trained tensors of one window."""

    loss: float
    gradients: dict[str, Tensor]
    changes: dict[str, Tensor]

    def errors(self, wanted: Result) -> dict[str, float]:
        """Relative errors by what they are of."""
        pairs = {"loss": (torch.tensor(self.loss), torch.tensor(wanted.loss))}
        for kind in ("gradients", "changes"):
            ours, theirs = getattr(self, kind), getattr(wanted, kind)
            assert ours.keys() == theirs.keys()
            pairs |= {f"{kind} of {name}": (ours[name], theirs[name]) for name in ours}
        return {name: relative_error(*pair) for name, pair in pairs.items()}

    def assert_close(self, wanted: Result, precision: str) -> None:
        errors, allowed = self.errors(wanted), tolerance(precision)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= allowed, f"{worst}: {errors[worst]:.2e}, allowed {allowed:.2e}"

    def assert_equal(self, wanted: Result) -> None:
        assert self.loss == wanted.loss
        for kind in ("gradients", "changes"):
            ours, theirs = getattr(self, kind), getattr(wanted, kind)
            differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
            assert not differing, f"other bits in the {kind} of {differing}"


def spec_on(device: torch.device, base: Path, data: Path, **changes: Any) -> RunSpec:
    """SGD at a rate of 1 in fp32 on all seven layers, so that an update is the clipped gradient."""
    training = {"training__optimizer": "sgd", "training__learning_rate": 1.0, "training__device": str(device)}
    return make_spec(base, data, Path("none"), **{"lora": ALL_SEVEN, **training, **changes})


@contextlib.contextmanager
def settings_of(spec: RunSpec, device: torch.device) -> Iterator[None]:
    """What a run sets for its spec."""
    training = spec.training
    with (
        deterministic_kernels(training.deterministic, device),
        fp32_products(training.precision),
        chosen_kernels(training.kernels, device),
        compiling(training.compile),
    ):
        yield


def learner_of(spec: RunSpec, device: torch.device) -> Learner:
    """With the matrices B filled, so that those of A have a gradient."""
    checkpoint = open_checkpoint(Path(spec.model.path))
    count, no_data = count_parameters(checkpoint.config, spec.adapter), None
    inputs = Inputs(checkpoint.config, checkpoint, "", no_data, None, None, {}, count, device)  # type: ignore[arg-type]
    learner = build_learner(spec, inputs, ignore_event, never_stop)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if learner.scaler.enabled:
        learner.scaler.scale = 64.0  # 65536 overflows in a model of such large weights
    return learner


def passes_of(spec: RunSpec, data: Path) -> list[Batch]:
    """The first window of a run of ``spec``."""
    return Schedule(spec, open_prepared(data).train).passes(0, PassRule())


def window_on(device: torch.device, base: Path, data: Path, **changes: Any) -> Result:
    """The first window of a spec on a device."""
    spec = spec_on(device, base, data, **changes)
    return window_of(spec, learner_of(spec, device), passes_of(spec, data), device)


def window_of(spec: RunSpec, learner: Learner, passes: list[Batch], device: torch.device) -> Result:
    """Gradients of a window, then its update."""
    before = copies(learner.parameters)
    with settings_of(spec, device):
        window_gradients(learner, passes, spec.training.seed, 0, LANES, Stopping(), ALONE)
        gradients = {name: parameter.grad for name, parameter in learner.parameters.items()}
        scaled = {name: grad / learner.scaler.scale for name, grad in gradients.items() if grad is not None}
        learner.optimizer.zero_grad()
        update = make_update(learner, passes, spec.training, 0, spec.training.rate)
    assert update.made
    changes = {name: x - before[name] for name, x in copies(learner.parameters).items()}
    return Result(update.loss, copies(scaled), changes)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
