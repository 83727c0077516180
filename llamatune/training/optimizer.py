"""Optimizers, and the learning rate as a function of the step.

``torch.optim`` is not used: the first optimizer made of its classes loads torch's compiler, which takes about as long
as torch itself. The kernels are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llamatune.errors import CheckpointError, SpecError
from llamatune.spec import TrainingSection
from llamatune.training.adamw_8bit import AdamW8bit

State = dict[str, Tensor]
"""What is remembered of one parameter."""


class UpdateRule(Protocol):
    """How weights follow from gradients; the three lists go together."""

    def fresh_state(self, parameter: Tensor) -> State:
        """What is remembered of a parameter before its first update."""

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        """Change weights and states in place; the gradients may be overwritten."""


class Optimizer:
    """Parameters, all of one dtype and on one device, and what ``rule`` remembers of each that had a gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rule: UpdateRule) -> None:
        assert len({(p.dtype, p.device) for p in parameters.values()}) == 1
        self.parameters, self.rule = dict(parameters), rule
        self.state: dict[str, State] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient; the others do not even decay."""
        with_grad = {name: p for name, p in self.parameters.items() if p.grad is not None}
        for name, parameter in with_grad.items():
            if name not in self.state:
                self.state[name] = self.rule.fresh_state(parameter)
        grads = [p.grad for p in with_grad.values() if p.grad is not None]
        if grads:
            states = [self.state[name] for name in with_grad]
            self.rule.update(list(with_grad.values()), grads, states, learning_rate)

    def zero_grad(self) -> None:
        """Let go of every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All that is remembered, as ``<parameter>/<state>``."""
        known = [name for name in self.parameters if name in self.state]
        return {f"{name}/{key}": tensor for name in known for key, tensor in self.state[name].items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Take ``state_tensors`` back, from any device; ``where`` they were read is for the error."""
        found: dict[str, State] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            found.setdefault(name, {})[key] = tensor
        for name, held in found.items():
            if name not in self.parameters:
                raise CheckpointError(f"optimizer state of the unknown parameter {name}", where)
            state = self.rule.fresh_state(self.parameters[name])
            for key, into in state.items():
                if key not in held or (held[key].dtype, held[key].shape) != (into.dtype, into.shape):
                    raise CheckpointError(f"its state of {name} is another optimizer's", where)
                into.copy_(held[key])
            self.state[name] = state


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); state: ``step``, ``exp_avg``, ``exp_avg_sq``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def fresh_state(self, parameter: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        steps, first, second = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            weights, grads, first, second, [], steps, lr=learning_rate, beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with momentum as torch defines it (Sutskever et al. 2013); state: ``momentum_buffer``."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def fresh_state(self, parameter: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        if self.weight_decay:
            torch._foreach_add_(grads, weights, alpha=self.weight_decay)
        if self.momentum:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, grads)
            if self.nesterov:
                torch._foreach_add_(grads, buffers, alpha=self.momentum)
            else:
                grads = buffers
        torch._foreach_add_(weights, grads, alpha=-learning_rate)


def build_optimizer(spec: TrainingSection, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that a spec names."""
    if spec.optimizer == "sgd":
        return Optimizer(parameters, SGD(spec.momentum, spec.nesterov, spec.weight_decay))
    rule = AdamW8bit if spec.optimizer == "adamw_8bit" else AdamW
    return Optimizer(parameters, rule(spec.betas, spec.eps, spec.weight_decay))


def warmup_steps(spec: TrainingSection, total_steps: int) -> int:
    """Updates of linear rise; longer than the run is a ``SpecError``, since the rate would never get there."""
    steps = spec.warmup_steps if spec.warmup_ratio is None else math.ceil(spec.warmup_ratio * total_steps)
    if steps > total_steps:
        raise SpecError(
            f"warm-up of {steps} steps is longer than the run of {total_steps}",
            "training.warmup_steps",
            "lower it, or set training.warmup_ratio",
        )
    return steps


def learning_rate_at(spec: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update that follows ``step`` updates.

    Warm-up reaches the full rate at its last update. Then ``constant`` holds it; ``linear`` and ``cosine`` fall to
    ``min_learning_rate`` over what is left (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.lr_scheduler == "constant":
        return spec.learning_rate
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - share if spec.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * left
