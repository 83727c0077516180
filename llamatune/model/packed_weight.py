"""Frozen matrices in a packed form: what all kinds of quantisation share.

Products unpack one matrix at a time, in the forward and again in the backward pass; autograd keeps none.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model import products
from llamatune.model.huge_pages import HugePages
from llamatune.model.layers import FrozenProduct, Linear, product_dtype
from llamatune.model.transformer import Transformer


class Scratch:
    """The buffer that matrices are unpacked into, shared by all layers of a model, and tables that they look up.

    Sharing is safe because a matrix is in the buffer only from its unpacking to the product that follows at once.
    ``FrozenProduct`` does both, forward and backward, and returns no view of it. Recomputation runs whole products.
    On a GPU both kernels are in one stream, so the next unpacking waits for the product. Two threads or two streams
    must not run one model at the same time. Every model has its own buffer.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self._inside: Hashable = None
        self._tables: dict[Hashable, Any] = {}

    def buffer(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``count`` uninitialised elements of the buffer; what was in it is lost."""
        self._inside = None
        return self._room(count, dtype, device)

    def filled(
        self, key: Hashable, count: int, dtype: torch.dtype, device: torch.device, fill: Callable[[Tensor], None]
    ) -> Tensor:
        """The buffer as ``fill`` leaves it, not filled anew if the last call had this key: tiles share their matrix."""
        room, key = self._room(count, dtype, device), (key, dtype, device)
        if self._inside != key:
            self._inside = None
            fill(room)
            self._inside = key
        return room

    def _room(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = count * dtype.itemsize
        buffer = self._buffers.get(device)
        if buffer is None or len(buffer) < size:
            buffer = None
            self._inside = None
            self._buffers.pop(device, None)  # freed before a larger one is allocated
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside it
                buffer = self._buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype)

    def table(self, make: Callable[..., Any], *key: Hashable) -> Any:
        """``make(*key)``, made once."""
        if (make, key) not in self._tables:
            self._tables[make, key] = make(*key)
        return self._tables[make, key]


class PackedWeight(nn.Module):
    """A frozen matrix (out, in) in a packed form; calling it gives x W^T.

    Its buffers are those of ``storage``, until it is rearranged. A kind of quantisation is a subclass: ``storage``,
    ``quantize`` and ``unpack_into``.
    """

    codes: Tensor
    any_layout = False
    """Whether a product may lie in memory column after column."""

    def __init__(self, shape: tuple[int, ...], tensors: dict[str, Tensor], scratch: Scratch) -> None:
        super().__init__()
        self.shape, self.scratch = shape, scratch
        for name, (dtype, wanted) in self.storage(shape).items():
            assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, wanted), name
            self.register_buffer(name, tensors[name])

    @staticmethod
    def storage(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors that hold a matrix of ``shape``; also what a cache file declares."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, W: Tensor, scratch: Scratch) -> Self:
        """The packed form of a finite matrix, on its device; beside W it needs a few megabytes."""
        raise NotImplementedError

    def unpack_into(self, flat: Tensor) -> None:
        """Write W, row after row, into ``flat``, which has ``room`` elements."""
        raise NotImplementedError

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        """The rows of several matrices as one, for ``multiplies_joined``; their tensors become parts of its.

        None where this kind, or how they lie, does not allow it.
        """
        return None

    def multiplies_joined(self, x: Tensor) -> bool:
        """Whether the product of joined matrices with ``x`` is quicker than the products of each."""
        return False

    @classmethod
    def is_rearranged(cls, elements: int) -> bool:
        """Whether ``rearrange`` changes how a matrix of so many elements, joined if it is to be, is held."""
        return False

    def rearrange(self) -> None:
        """Hold it as products of generation read it fastest on a CPU, and no longer as ``storage`` says."""

    def hold_in(self, pages: HugePages) -> None:
        """Move the codes to huge pages."""
        self.codes = pages.copied(self.codes)

    @property
    def room(self) -> int:
        """Elements that W is unpacked into."""
        return math.prod(self.shape)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype`` inside the shared buffer: use it at once, the next call overwrites it."""
        flat = self.scratch.filled(weakref.ref(self), self.room, dtype, self.device, self.unpack_into)
        return flat[: math.prod(self.shape)].view(self.shape)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """x (..., in) W^T in x's dtype, without autograd; of rows, in ``out`` and with what is ``added``."""
        W = self.unpacked(x.dtype)
        return F.linear(x, W) if x.dim() != 2 else products.product(x, W.T, out, added)

    def product_back(self, grad: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """grad (..., out) W in grad's dtype, without autograd; of rows, in ``out`` or added to what is there."""
        W = self.unpacked(grad.dtype)
        return grad @ W if grad.dim() != 2 else products.product_back(grad, W, out, add)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) W^T in autocast's dtype, or in x's own outside autocast."""
        wanted = x.to(product_dtype(x))
        if not torch.is_grad_enabled():
            return self.product(wanted)  # at once: autograd's function takes time in every step of decoding
        return FrozenProduct.apply(wanted, self.product, self.product_back)  # type: ignore[no-any-return, no-untyped-call]


def hold_quantized(linear: nn.Module, weight: PackedWeight) -> None:
    """Replace a linear layer's matrix by a packed one."""
    assert isinstance(linear, Linear)
    assert (linear.out_features, linear.in_features) == weight.shape
    linear.register_parameter("weight", None)
    linear.quantized = weight
    weight.any_layout = linear.any_layout


def quantize_blocks(model: Transformer, kind: type[PackedWeight], dtype: torch.dtype) -> None:
    """Quantise every linear layer of every block of a model in memory; embedding, norms and head go to ``dtype``."""
    scratch = Scratch()
    for module in model.model.layers.modules():
        if isinstance(module, Linear) and module.quantized is None:
            hold_quantized(module, kind.quantize(module.weight, scratch))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
