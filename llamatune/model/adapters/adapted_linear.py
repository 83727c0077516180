"""An adapted linear layer: a frozen matrix, and the trained tensors of one kind of adapter beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llamatune.model.layers import Dropout, Linear, Trained


class AdaptedLinear(Linear):
    """A frozen layer with an adapter on it; ``weight`` or ``quantized`` keeps its name and its tensors.

    A kind of adapter is a subclass: ``start``, ``forward``, ``gradients`` and ``merged``. Its trained tensors are fp32
    parameters under the names of ``shapes``. The hand-written code of a fused block sees them as one tuple.
    """

    casts: Trained = ()
    """The trained tensors in another dtype, while ``window_casts`` keeps them."""

    def __init__(self, frozen: Linear, shapes: Mapping[str, tuple[int, ...]], scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", None)
        self.weight, self.quantized = frozen.weight, frozen.quantized
        self.scaling, self.dropout, self.trained_names = scaling, dropout, tuple(shapes)
        device = next(itertools.chain(frozen.parameters(), frozen.buffers())).device
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))

    @property
    def trained(self) -> Trained:  # type: ignore[override]
        return tuple(getattr(self, name) for name in self.trained_names)

    def trained_in(self, dtype: torch.dtype) -> Trained:
        """The trained tensors in a product's dtype: as they were cast for the window, or cast now."""
        if self.casts and self.casts[0].dtype == dtype:
            return self.casts
        return tuple(tensor.to(dtype) for tensor in self.trained)

    def draw_dropout(self) -> Dropout:
        return Dropout.drawn(self.dropout if self.training else 0.0)

    def start(self, generator: torch.Generator) -> None:
        """Draw the tensors that an untrained adapter has, in place; they change nothing of what the layer computes."""
        raise NotImplementedError

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        """The weight with the adapter in it, fp32 in new memory, of the rows ``rows`` of it, which ``W`` holds.

        Rounding it, once, is the caller's.
        """
        raise NotImplementedError
