"""LoRA (Hu et al. 2021): W x + (alpha / r) · B A x with W frozen, A (R, in) and B (out, R) trained in fp32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.errors import SpecError
from llamatune.model.config import LINEAR_MODULES
from llamatune.model.transformer import Linear, Transformer


class LoRALinear(Linear):
    """A frozen matrix and its trained low-rank update; ``weight`` or ``quantized`` keeps its name and its tensors.

    A is Kaiming-uniform with gain as in the reference implementation (bound 1/sqrt(in)), B is zero: the update starts
    at exactly nothing.
    """

    def __init__(self, frozen: Linear, r: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", None)
        self.weight, self.quantized = frozen.weight, frozen.quantized
        self.scaling, self.dropout = alpha / r, dropout
        device = next(itertools.chain(frozen.parameters(), frozen.buffers())).device
        self.lora_A = nn.Parameter(torch.zeros(r, frozen.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, r, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)  # (..., out)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., R) -> (..., out)
        return base + (update * self.scaling).to(base.dtype)


def apply_lora(model: Transformer, r: int, alpha: float, dropout: float, targets: Iterable[str], seed: int = 0) -> None:
    """Freeze ``model`` and put a ``LoRALinear`` in the place of every target of every block, drawn from ``seed``."""
    wanted = set(targets)
    unknown = sorted(wanted - set(LINEAR_MODULES))
    if unknown or not wanted:
        raise SpecError(
            f"no linear layer called {unknown[0]!r}" if unknown else "no target modules",
            "lora.target_modules",
            f"there are {', '.join(LINEAR_MODULES)}",
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name, child in list(parent.named_children()):
            if name in wanted and isinstance(child, Linear):
                adapted = LoRALinear(child, r, alpha, dropout)
                bound = 1 / math.sqrt(child.in_features)
                drawn = torch.empty(r, child.in_features).uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    adapted.lora_A.copy_(drawn)
                setattr(parent, name, adapted)


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every trained matrix under its adapter name, ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            yield f"{name}.weight", parameter


def load_lora(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill the adapter of a model from tensors under their adapter names; both sets of names are the same."""
    parameters = dict(lora_parameters(model))
    assert parameters.keys() == tensors.keys(), "the adapter was not checked against the model"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + scaling · B A, (out, in) in fp32; rounding it, once, is the caller's."""
    return W.float() + (B.float() @ A.float()) * scaling
