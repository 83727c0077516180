"""Random initialisation of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def drawn_weights(
    model: nn.Module, seed: int, std: float = 0.02, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every weight, in fp32: matrices from N(0, std²), norms 1, biases 0.

    They are the same for a seed and a device. A CPU draws with one core, 44 s for 7 billion weights. Each kind of GPU
    draws other numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        if parameter.dim() == 1:
            yield name, drawn.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            yield name, drawn.normal_(0.0, std, generator=generator)


def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Draw every weight anew, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, drawn in drawn_weights(model, seed, std):
            parameters[name].copy_(drawn)
