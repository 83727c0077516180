"""One frozen base for several adapters that are trained in turns, and the products of its matrices that they share.

The matrix is unpacked, or cast, once for all. Then the rows of each adapter are multiplied by the same call, of the
same shapes, as when it is trained alone, or all of them at once where that gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamatune.lockstep import Lockstep
from llamatune.model import products
from llamatune.model.layers import Linear, linear, product_dtype
from llamatune.model.stacked_rows import StackedRows
from llamatune.model.transformer import Head, Transformer
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_path

_TURN_S = 0.5
"""How long a turn is, in whole passes, where no product is shared: changing turns takes some milliseconds."""


@dataclass(frozen=True)
class _Product:
    """What one adapter asks for: ``x`` W^T plus what is ``added``, or x W ``added_to`` what is in ``out``."""

    x: Tensor
    out: Tensor | None
    added: Tensor | None = None
    adds_to_out: bool = False


class SharedMatrix(nn.Module):
    """The frozen matrix (out, in) of a linear layer, as it is held; stands where a quantised one stands.

    Products are asked for in ``lockstep``, those that gain by it, if they are ``shared``. ``places`` are those of the
    product and of its gradient in a pass.
    """

    def __init__(
        self, source: Linear, lockstep: Lockstep[Any, Any], stacked: StackedRows, places: tuple[int, int], shared: bool
    ) -> None:
        super().__init__()
        self.shape = (source.out_features, source.in_features)
        self.weight, self.packed = source.weight, source.quantized
        self._lockstep, self._stacked, self._places, self.is_shared = lockstep, stacked, places, shared

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype``; of a quantised one inside a shared buffer: use it at once."""
        return self.weight.to(dtype) if self.packed is None else self.packed.unpacked(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) W^T, by autograd and for one adapter."""
        return linear(x, self.weight) if self.packed is None else self.packed(x)

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """x (N, in) W^T in x's dtype, without autograd; ``out`` and ``added`` as of ``products.product``."""
        return self._ask("product", _Product(x, out, added), self._forward)

    def product_back(self, grad: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """grad (N, out) W in grad's dtype, without autograd; ``out`` and ``add`` as of ``products.product_back``."""
        return self._ask("product_back", _Product(grad, out, adds_to_out=add), self._backward)

    def _ask(self, which: str, asked: _Product, answers: Callable[[list[_Product]], list[Tensor]]) -> Tensor:
        x = asked.x
        if not self.is_shared:
            return answers([asked])[0]
        if self.packed is None and self.weight.dtype == x.dtype:
            B = self.weight if which == "product_back" else self.weight.T
            if not self._stacked.suit(x, B):
                return answers([asked])[0]  # nothing is shared, and a turn takes time
        key = (id(self), which, x.dtype, torch.is_grad_enabled())
        return self._lockstep.ask(key, self._places[which == "product_back"], asked, answers)  # type: ignore[no-any-return]

    def _forward(self, asked: list[_Product]) -> list[Tensor]:
        W = self.unpacked(asked[0].x.dtype).T
        together = None if any(one.added is not None for one in asked) else self._stack(asked, W)
        return together or [products.product(one.x, W, one.out, one.added) for one in asked]

    def _backward(self, asked: list[_Product]) -> list[Tensor]:
        W = self.unpacked(asked[0].x.dtype)
        together = None if any(one.adds_to_out for one in asked) else self._stack(asked, W)
        return together or [products.product_back(one.x, W, one.out, one.adds_to_out) for one in asked]

    def _stack(self, asked: list[_Product], B: Tensor) -> list[Tensor] | None:
        return self._stacked.product([one.x for one in asked], B, [one.out for one in asked])


class _HeadCast:
    """The head's matrix in the dtype of products, from its first use in a pass to the begin of the next pass."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight
        if self.held is None or self.held.dtype != dtype:
            self.held = weight.detach().to(dtype)
        return self.held


class SharedHead(Head):
    """A frozen output layer whose matrix is cast once for the passes of all adapters."""

    def __init__(self, cast: _HeadCast, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size)
        self._cast = cast

    def forward(self, x: Tensor, read: Any = linear) -> Any:  # type: ignore[override]
        return read(x, self._cast.of(self.weight, product_dtype(x)))


class _InLockstep(Transformer):
    """A model on shared weights. A pass begins when those of all others do, but within ``turn_s`` seconds at once."""

    def __init__(self, config: LlamaConfig, lockstep: Lockstep[Any, Any], cast: _HeadCast, turn_s: float) -> None:
        super().__init__(config)
        self.lm_head = SharedHead(cast, config.hidden_size, config.vocab_size)
        self._lockstep, self._cast, self._turn_s, self._turn_ends = lockstep, cast, turn_s, 0.0

    def forward(self, *args: Any, **named: Any) -> Any:
        if time.monotonic() >= self._turn_ends:
            self._lockstep.wait()
            self._turn_ends = time.monotonic() + self._turn_s
        self._cast.held = None
        return super().forward(*args, **named)


class SharedBase:
    """Gives each adapter a model of its own, without a weight of its own, on the weights of ``base``.

    Products of matrices of fewer than ``least_elements`` are not shared: a turn may take longer than what it saves.
    """

    def __init__(self, base: Transformer, lockstep: Lockstep[Any, Any], least_elements: int = 0) -> None:
        self._base, self._lockstep, self._cast = base, lockstep, _HeadCast()
        paths = [
            f"model.layers.{layer}.{linear_path(name)}"
            for layer in range(base.config.num_hidden_layers)
            for name in LINEAR_MODULES
        ]
        self._matrices: dict[str, SharedMatrix] = {}
        stacked = StackedRows()
        for place, path in enumerate(paths):
            source = base.get_submodule(path)
            assert isinstance(source, Linear)
            places = place, 2 * len(paths) - place
            shared = source.in_features * source.out_features >= least_elements
            self._matrices[path] = SharedMatrix(source, lockstep, stacked, places, shared)
        self._turn_s = 0.0 if any(matrix.is_shared for matrix in self._matrices.values()) else _TURN_S

    def model(self) -> Transformer:
        """A model for one adapter, which nothing is adapted in yet."""
        with torch.device("meta"):
            model = _InLockstep(self._base.config, self._lockstep, self._cast, self._turn_s)
        model.activation_dtype = self._base.activation_dtype
        for name, parameter in self._base.named_parameters():
            path, _, attribute = name.rpartition(".")
            if path in self._matrices and attribute == "weight":
                continue
            setattr(model.get_submodule(path), attribute, parameter)
        if self._base.lm_head is None:
            model.get_submodule("lm_head").weight = self._base.model.embed_tokens.weight
        for path, matrix in self._matrices.items():
            layer = model.get_submodule(path)
            layer.register_parameter("weight", None)
            layer.quantized = matrix
        return model
