"""An adapted linear layer: a frozen matrix, and the trained tensors of one kind of adapter beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.layers import Dropout, Linear, Trained
from llamatune.shapes.adapter import AdapterKind

T = TypeVar("T")


class AdaptedLinear(Linear):
    """A frozen layer with an adapter on it; ``weight`` or ``quantized``, and ``bias``, keep their names and tensors.

    A kind of adapter is a subclass: ``start``, ``forward``, ``gradients`` and ``merged``. Its tensors are fp32
    parameters under the names of ``shapes``, trained but for those that its kind says are ``frozen``. The hand-written
    code of a fused block sees what is trained as one tuple.
    """

    kind: AdapterKind
    drawn = "kaiming"
    casts_for_window = True
    """Whether products use the tensors as they are cast; a kind that derives others from them keeps those."""
    casts: Trained = ()
    """The tensors in another dtype, while ``window_casts`` keeps them."""
    switch: AdapterSwitch | None = None
    """Where the base is computed beside the adapted model; None: nowhere."""
    window: dict[Hashable, Any] | None = None
    """What is derived from the tensors, in a window, where they do not change; None: outside of one."""

    def __init__(self, frozen: Linear, shapes: Mapping[str, tuple[int, ...]], scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", frozen.bias)
        self.weight, self.quantized = frozen.weight, frozen.quantized
        self.scaling, self.dropout = scaling, dropout
        self.names = self.trained_names = tuple(shapes)
        device = next(itertools.chain(frozen.parameters(), frozen.buffers())).device
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
        self.forget()

    def belong_to(self, kind: AdapterKind) -> None:
        """Freeze what the kind does not train."""
        self.kind, self.trained_names = kind, tuple(name for name in self.names if name not in kind.frozen)
        for name in kind.frozen:
            getattr(self, name).requires_grad_(False)

    @property
    def tensors(self) -> Trained:
        """The adapter's own, those that are not trained too."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def trained(self) -> Trained:  # type: ignore[override]
        return tuple(getattr(self, name) for name in self.trained_names)

    def tensors_in(self, dtype: torch.dtype) -> Trained:
        """The tensors in a product's dtype: as they were cast for the window, or cast now."""
        if self.casts and self.casts[0].dtype == dtype:
            return self.casts
        return tuple(tensor.to(dtype) for tensor in self.tensors)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` computes from the tensors, once in a window, and once if they are not trained."""
        kept = self.window
        if kept is None:
            if any(tensor.requires_grad for tensor in self.trained):
                return make()
            kept = self._derived
        if key not in kept:
            kept[key] = make()
        return kept[key]  # type: ignore[no-any-return]

    def switched(self, adapted: Tensor, base: Tensor) -> Tensor:
        """``adapted``, but ``base`` where the switch has the adapter off."""
        return adapted if self.switch is None else self.switch.choose(adapted, base)

    def forget(self) -> None:
        """The tensors have changed."""
        self._derived: dict[Hashable, Any] = {}

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

    @staticmethod
    def stored(tensors: Trained) -> Trained:
        """The tensors as they are written, by PEFT's meaning of ``AdapterSpec.stored``."""
        return tensors

    @staticmethod
    def restored(stored: Trained) -> Trained:
        """The tensors again, bit for bit."""
        return stored
