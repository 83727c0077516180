"""NF4 quantisation of frozen weights to 4 bits (QLoRA, Dettmers et al. 2023, section 3), 0.516 bytes a weight.

A matrix is read row after row in blocks of 64. Each weight becomes the nearest of 16 levels, the quantiles of a normal
distribution, times its block's scale. The scales (the blocks' largest magnitudes) are quantised too: their mean is
subtracted, and the rest is held in 8 bits in blocks of 256 (section 3, "double quantization"). Unlike in the paper,
levels are chosen with the scale as it will be read back, which is never worse.

Products unpack one matrix at a time, in the forward and again in the backward pass; autograd keeps none.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model import blockwise_8bit
from llamatune.model.blockwise_8bit import BlockwiseCode
from llamatune.model.compiled_functions import compilable, is_compiling
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.layers import FrozenProduct, Linear, product_dtype
from llamatune.model.transformer import Transformer
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper."""
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(LEVELS))


def storage(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that hold a matrix of ``shape``; also what a cache file declares."""
    blocks = -(-math.prod(shape) // BLOCK)
    groups = -(-blocks // blockwise_8bit.BLOCK)
    return {
        "codes": (torch.uint8, (blocks * BLOCK // 2,)),
        "scale_codes": (torch.uint8, (groups * blockwise_8bit.BLOCK,)),
        "scale_factors": (torch.float32, (groups,)),
        "scale_mean": (torch.float32, ()),
    }


class Scratch:
    """The buffer that matrices are unpacked into, shared by all layers of a model, and the lookup tables.

    Sharing is safe because a matrix is in the buffer only from its unpacking to the product that follows at once.
    ``FrozenProduct`` does both, forward and backward, and returns no view of it. Recomputation runs whole products.
    On a GPU both kernels are in one stream, so the next unpacking waits for the product. Two threads or two streams
    must not run one model at the same time. Every model has its own buffer.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self._pairs: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._scales: dict[torch.device, BlockwiseCode] = {}
        self.inside: tuple[object, ...] = ()
        """What says which matrix is in the buffer, in which dtype."""

    def buffer(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``count`` uninitialised elements of the buffer; what was in it is lost."""
        size = count * dtype.itemsize
        buffer = self._buffers.get(device)
        if buffer is None or len(buffer) < size:
            buffer = None
            self._buffers.pop(device, None)  # freed before a larger one is allocated
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside it
                buffer = self._buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
            self.inside = ()
        return buffer[:size].view(dtype)

    def pairs(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """For each of the 256 bytes its two levels in ``dtype``, seen as one integer twice as wide.

        One gather of 256 integers then unpacks two weights (first the high nibble).
        """
        if (device, dtype) not in self._pairs:
            levels = torch.tensor(LEVELS, dtype=dtype, device=device)
            table = torch.cartesian_prod(levels, levels).contiguous()  # (256, 2)
            assert dtype.itemsize in (2, 4), f"no NF4 matrix is unpacked to {dtype}"
            self._pairs[device, dtype] = table.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)
        return self._pairs[device, dtype]

    def scales(self, device: torch.device) -> BlockwiseCode:
        """The 8-bit code of the scales."""
        if device not in self._scales:
            self._scales[device] = BlockwiseCode(signed=True, device=device)
        return self._scales[device]


class NF4Weight(nn.Module):
    """A frozen matrix (out, in) in NF4; calling it gives x W^T. Its buffers are those of ``storage``."""

    codes: Tensor
    scale_codes: Tensor
    scale_factors: Tensor
    scale_mean: Tensor

    def __init__(self, shape: tuple[int, ...], tensors: dict[str, Tensor], scratch: Scratch) -> None:
        super().__init__()
        self.shape, self.scratch = shape, scratch
        for name, (dtype, wanted) in storage(shape).items():
            assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, wanted), name
            self.register_buffer(name, tensors[name])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def scales(self) -> Tensor:
        """The blocks' scales as read back, fp32 (blocks,)."""
        code, blocks = self.scratch.scales(self.device), len(self.codes) * 2 // BLOCK
        return block_scales(self.scale_codes, self.scale_factors, self.scale_mean, code)[:blocks]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype`` inside the shared buffer: use it at once, the next call overwrites it."""
        flat = self.scratch.buffer(len(self.codes) * 2, dtype, self.device)
        this = weakref.ref(self), dtype, self.device
        if self.scratch.inside != this:  # one tile of rows after another asks for the same
            self.scratch.inside = ()
            self._unpack_into(flat)
            self.scratch.inside = this
        return flat[: math.prod(self.shape)].view(self.shape)

    def _unpack_into(self, flat: Tensor) -> None:
        code, pairs = self.scratch.scales(self.device), self.scratch.pairs(flat.dtype, self.device)
        unpack(self.codes, self.scale_codes, self.scale_factors, self.scale_mean, code, pairs, flat)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) W^T in autocast's dtype, or in x's own outside autocast."""
        return FrozenProduct.apply(x.to(product_dtype(x)), self.unpacked)  # type: ignore[no-any-return, no-untyped-call]


def block_scales(scale_codes: Tensor, scale_factors: Tensor, scale_mean: Tensor, scale_code: BlockwiseCode) -> Tensor:
    """The scales that codes, factors and mean stand for, fp32, whole groups of 256."""
    return scale_code.decode(scale_codes, scale_factors) + scale_mean


@by_kernel("nf4_unpacking")
def unpack(
    codes: Tensor,
    scale_codes: Tensor,
    scale_factors: Tensor,
    scale_mean: Tensor,
    scale_code: BlockwiseCode,
    pairs: Tensor,
    out: Tensor,
) -> None:
    """Write the weights (64 N,) of the tensors of ``storage`` into ``out``; ``pairs`` are the scratch's."""
    scales = block_scales(scale_codes, scale_factors, scale_mean, scale_code)[: len(out) // BLOCK]
    if is_compiling() and out.is_cuda:  # a CPU is faster in pieces that stay in its cache
        dequantize_at_once(codes.view(-1, BLOCK // 2), scales[:, None], pairs.view(out.dtype), out.view(-1, BLOCK))
    else:
        dequantize(codes, scales, pairs, out)


def dequantize(codes: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the weights (64 N,) of ``codes`` (32 N,) and fp32 ``scales`` (N,) into ``out``, a piece at a time.

    A level rounded to out's dtype is multiplied in fp32 and rounded once more: within 2⁻⁸ in bf16, exact in fp32.
    """
    step = WEIGHTS_AT_ONCE[out.device.type]
    for begin in range(0, len(out), step):
        piece = out[begin : begin + step]
        bytes_of_piece = codes[begin // 2 : (begin + step) // 2].int()
        torch.index_select(pairs, 0, bytes_of_piece, out=piece.view(pairs.dtype))
        piece.view(-1, BLOCK).mul_(scales[begin // BLOCK : (begin + step) // BLOCK, None])


@compilable
def dequantize_at_once(codes: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """The same to the bit from codes (N, 32), scales (N, 1) and levels in out's dtype (512,) to out (N, 64)."""
    out.copy_(pairs.view(256, 2)[codes.int()].view(out.shape) * scales)


def quantize_nf4(W: Tensor, scratch: Scratch) -> NF4Weight:
    """The NF4 form of a finite matrix, on its device; beside W it needs a few megabytes."""
    flat = W.detach().reshape(-1)
    shapes = storage(tuple(W.shape))
    with torch.no_grad():
        scales = torch.cat([piece.abs().amax(1) for piece in _pieces(flat)])
        # Summed in fp64, so that thread count and device cannot move its last bit.
        mean = scales.double().mean().float()
        padding = shapes["scale_codes"][1][0] - len(scales)
        scale_codes, factors = scratch.scales(W.device).encode(F.pad(scales - mean, (0, padding)))
        tensors = {"scale_codes": scale_codes, "scale_factors": factors, "scale_mean": mean}
        tensors["codes"] = torch.empty(shapes["codes"][1], dtype=torch.uint8, device=W.device)
        weight = NF4Weight(tuple(W.shape), tensors, scratch)
        scales, begin = weight.scales(), 0
        for piece in _pieces(flat):
            # A scale that came back as zero gives NaN or infinity here and zeros later, whatever the code.
            codes = _nearest(piece / scales[begin : begin + len(piece), None]).view(-1, 2)
            first = begin * BLOCK // 2
            torch.add(codes[:, 0] << 4, codes[:, 1], out=weight.codes[first : first + len(codes)])
            begin += len(piece)
    return weight


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """The weights in fp32, (blocks, 64) at a time; zeros fill the last block."""
    for piece in torch.split(flat, WEIGHTS_AT_ONCE[flat.device.type]):
        wide, missing = piece.float(), -len(piece) % BLOCK
        yield (F.pad(wide, (0, missing)) if missing else wide).view(-1, BLOCK)


def _nearest(quotients: Tensor) -> Tensor:
    """The numbers (uint8) of the nearest levels: how many of the 15 middles between levels lie below each quotient.

    Fifteen comparisons are three times as fast as ``torch.bucketize`` on a CPU, and give the same.
    """
    count = torch.zeros(quotients.shape, dtype=torch.uint8, device=quotients.device)
    above = torch.empty(quotients.shape, dtype=torch.bool, device=quotients.device)
    for middle in _MIDDLES:
        count.add_(torch.gt(quotients, middle, out=above).view(torch.uint8))
    return count


def hold_quantized(linear: nn.Module, weight: NF4Weight) -> None:
    """Replace a linear layer's matrix by an NF4 matrix."""
    assert isinstance(linear, Linear)
    assert (linear.out_features, linear.in_features) == weight.shape
    linear.register_parameter("weight", None)
    linear.quantized = weight


def quantize_blocks(model: Transformer, dtype: torch.dtype) -> None:
    """Quantise every linear layer of every block of a model in memory; embedding, norms and head go to ``dtype``."""
    scratch = Scratch()
    for module in model.model.layers.modules():
        if isinstance(module, Linear) and module.quantized is None:
            hold_quantized(module, quantize_nf4(module.weight, scratch))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
