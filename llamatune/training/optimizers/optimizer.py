"""The optimizer: trained parameters, their state and one update rule. The rules AdamW and SGD.

``torch.optim`` is not used: the first optimizer made of its classes loads torch's compiler, which takes about as long
as torch itself. The kernels are torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llamatune.errors import CheckpointError

State = dict[str, Tensor]
"""The optimizer's state of one parameter."""


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), by torch's fused kernel.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

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
    """Gradient descent with momentum as torch defines it (Sutskever et al. 2013).

    State: ``momentum_buffer`` where there is momentum.
    """

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


class Optimizer:
    """Parameters, all of one dtype and on one device, and the state by ``rule`` of each that had a gradient.

    A rule changes weights and states in place, given lists in one order; it may overwrite the gradients. ``ratios``
    multiply the learning rate of some parameters (LoRA+, Hayou et al. 2024).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], rule: AdamW | SGD, ratios: Mapping[str, float] | None = None
    ) -> None:
        assert len({(p.dtype, p.device) for p in parameters.values()}) == 1
        self.parameters, self.rule = dict(parameters), rule
        self._ratios = {name: (ratios or {}).get(name, 1.0) for name in parameters}
        self.state: dict[str, State] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient; the others do not even decay."""
        with_grad = {name: p for name, p in self.parameters.items() if p.grad is not None}
        for name, parameter in with_grad.items():
            if name not in self.state:
                self.state[name] = self.rule.fresh_state(parameter)
        for ratio in dict.fromkeys(self._ratios[name] for name in with_grad):
            group = {name: p for name, p in with_grad.items() if self._ratios[name] == ratio}
            grads = [p.grad for p in group.values() if p.grad is not None]
            self.rule.update(list(group.values()), grads, [self.state[name] for name in group], learning_rate * ratio)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, named ``<parameter>/<state>``."""
        known = [name for name in self.parameters if name in self.state]
        return {f"{name}/{key}": tensor for name in known for key, tensor in self.state[name].items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Take ``state_tensors`` back, from any device; an error names ``where`` they were read."""
        saved: dict[str, State] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            saved.setdefault(name, {})[key] = tensor
        for name, saved_state in saved.items():
            if name not in self.parameters:
                raise CheckpointError(f"optimizer state of the unknown parameter {name}", where)
            state = self.rule.fresh_state(self.parameters[name])
            for key, into in state.items():
                saved_tensor = saved_state.get(key)
                if saved_tensor is None or (saved_tensor.dtype, saved_tensor.shape) != (into.dtype, into.shape):
                    raise CheckpointError(f"its state of {name} is another optimizer's", where)
                into.copy_(saved_tensor)
            self.state[name] = state
