"""An adapted linear layer: a frozen matrix, and the trained tensors of one kind of adapter beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llamatune.model.layers import Dropout, Linear, Trained
from llamatune.shapes.adapter import AdapterKind

T = TypeVar("T")


class AdaptedLinear(Linear):
    """A frozen layer with an adapter on it; ``weight`` or ``quantized`` keeps its name and its tensors.

    A kind of adapter is a subclass: ``start``, ``forward``, ``gradients`` and ``merged``. Its trained tensors are fp32
    parameters under the names of ``shapes``. The hand-written code of a fused block sees them as one tuple.
    """

    kind: AdapterKind
    casts_for_window = True
    """Whether products use the trained tensors as they are cast; a kind that derives others from them keeps those."""
    casts: Trained = ()
    """The trained tensors in another dtype, while ``window_casts`` keeps them."""
    window: dict[Hashable, Any] | None = None
    """What is derived from the trained tensors, in a window, where they do not change; None: outside of one."""

    def __init__(self, frozen: Linear, shapes: Mapping[str, tuple[int, ...]], scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", None)
        self.weight, self.quantized = frozen.weight, frozen.quantized
        self.scaling, self.dropout, self.trained_names = scaling, dropout, tuple(shapes)
        device = next(itertools.chain(frozen.parameters(), frozen.buffers())).device
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
        self.forget()

    @property
    def trained(self) -> Trained:  # type: ignore[override]
        return tuple(getattr(self, name) for name in self.trained_names)

    def trained_in(self, dtype: torch.dtype) -> Trained:
        """The trained tensors in a product's dtype: as they were cast for the window, or cast now."""
        if self.casts and self.casts[0].dtype == dtype:
            return self.casts
        return tuple(tensor.to(dtype) for tensor in self.trained)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` computes from the trained tensors, once in a window, and once if they are not trained."""
        kept = self.window
        if kept is None:
            if any(tensor.requires_grad for tensor in self.trained):
                return make()
            kept = self._derived
        if key not in kept:
            kept[key] = make()
        return kept[key]  # type: ignore[no-any-return]

    def forget(self) -> None:
        """The trained tensors have changed."""
        self._derived: dict[Hashable, Any] = {}

    def draw_dropout(self) -> Dropout:
        return Dropout.drawn(self.dropout if self.training else 0.0)

    def start(self, generator: torch.Generator) -> None:
        """Draw the tensors that an untrained adapter has, in place; they change nothing of what the layer computes."""
        raise NotImplementedError

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        """The weight with the adapter in it, fp32, of the rows ``rows`` of it, which ``W`` holds.

        Rounding it, once, is the caller's.
        """
        raise NotImplementedError
