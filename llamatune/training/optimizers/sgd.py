"""The SGD update rule: gradient descent with momentum as torch defines it (Sutskever et al. 2013)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """Gradient descent; state: ``momentum_buffer`` where there is momentum."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}

    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], learning_rate: float
    ) -> None:
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
