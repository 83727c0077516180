"""Update rules: what each optimizer does to weights. AdamW and SGD; AdamW with 8-bit state has a file of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
"""The optimizer's state of one parameter."""


class UpdateRule(Protocol):
    """How weights follow from gradients; the three lists are in one order."""

    def fresh_state(self, parameter: Tensor) -> State:
        """The state of a parameter before its first update."""

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        """Change weights and states in place; the gradients may be overwritten."""


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
