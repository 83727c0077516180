"""The optimizer: trained parameters, their state and one update rule; which rule a spec names.

``torch.optim`` is not used: the first optimizer made of its classes loads torch's compiler, which takes about as long
as torch itself. The kernels are torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llamatune.errors import CheckpointError
from llamatune.spec import TrainingSection
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.update_rules import SGD, AdamW, State, UpdateRule


class Optimizer:
    """Parameters, all of one dtype and on one device, and the state by ``rule`` of each that had a gradient."""

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
        """Free every gradient."""
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


def build_optimizer(spec: TrainingSection, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that a spec names."""
    if spec.optimizer == "sgd":
        return Optimizer(parameters, SGD(spec.momentum, spec.nesterov, spec.weight_decay))
    rule = AdamW8bit if spec.optimizer == "adamw_8bit" else AdamW
    return Optimizer(parameters, rule(spec.betas, spec.eps, spec.weight_decay))
