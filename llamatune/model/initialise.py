"""Random initialisation of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Draw every weight anew, in place: matrices from N(0, std²) in fp32, norms 1; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
