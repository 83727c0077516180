"""Sizes of a model as it is held and computed in, which training and generation share.

Letters as in ``model``: D hidden, Q and K the widths of all query and of all key-value heads, F feed-forward, V
vocabulary. Lower case for bytes an element: ``w`` of a held weight, ``c`` of what products are computed in.
"""

from __future__ import annotations

import functools
import math

from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.capabilities import OLDEST_FOR_TRITON, OLDEST_WITH_BF16, OLDEST_WITH_FP8, Capability
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.dtypes import QUANTIZED_DTYPES, WEIGHT_BYTES
from llamatune.shapes.float8_products import runs_in_float8
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_module
from llamatune.shapes.tile_sizes import NORMED_AT_ONCE, WEIGHTS_AT_ONCE

CODE_TABLE_BYTES = 4 << 16
"""Of what finds the level of an 8-bit blockwise code."""


class ModelSizes:
    """Sizes of a model of this shape.

    Args:
        dtype: what the matrices of the blocks are held in, a quantised one too.
        others: what all else is held in.
        computed: what products are computed in.
        adapter: None where there is none.
        kernels: whether Triton kernels run where a GPU can run them.
    """

    def __init__(
        self,
        config: LlamaConfig,
        dtype: str,
        others: str,
        computed: str,
        adapter: AdapterSpec | None,
        cuda: Gpu,
        kernels: bool = True,
    ) -> None:
        self.config, self.dtype, self.computed, self.cuda = config, dtype, computed, bool(cuda)
        self.device = "cuda" if cuda else "cpu"
        self.D, self.F, self.V = config.hidden_size, config.intermediate_size, config.vocab_size
        self.Q, self.K = config.linear_shape("q_proj")[0], config.linear_shape("k_proj")[0]
        self.normed = self.Q + self.K if config.head_norms else 0  # widths of what has norms of heads
        self.quantized = dtype in QUANTIZED_DTYPES
        self.w, self.c = WEIGHT_BYTES[others], WEIGHT_BYTES[computed]
        self.capability = _capability(cuda, computed, dtype)
        self.kernels = kernels and (self.capability or (0, 0)) >= OLDEST_FOR_TRITON
        self.casts = others != computed
        self.adapter, self.targets = adapter, frozenset(adapter.modules if adapter else ())
        self.dora = adapter is not None and adapter.kind == "dora"

    @property
    def block(self) -> int:
        """The frozen tensors of a block."""
        if not self.quantized:
            return self.block_parameters * self.w
        return sum(self.packed(self.config.linear_shape(name)) for name in LINEAR_MODULES) + self._vectors * self.w

    def packed(self, shape: tuple[int, ...]) -> int:
        """A quantised matrix."""
        return {"nf4": _nf4_bytes, "float8": _float8_bytes, "int8": _int8_bytes}[self.dtype](shape)

    @property
    def block_parameters(self) -> int:
        return sum(self.count(name) for name in LINEAR_MODULES) + self._vectors

    @property
    def other_parameters(self) -> int:
        """Those outside the blocks."""
        blocks = self.block_parameters * self.config.num_hidden_layers
        return count_parameters(self.config).base_parameters - blocks

    @functools.cached_property
    def _vectors(self) -> int:
        """Elements of the norms and biases of a block."""
        shapes = self.config.with_layers(1).parameter_shapes()
        return sum(math.prod(shape) for name, shape in shapes if ".layers." in name and not linear_module(name))

    @property
    def unpacking(self) -> int:
        """The buffer that quantised matrices are unpacked into, and NF4's table for their scales; they stay."""
        if not self.quantized:
            return 0
        table = CODE_TABLE_BYTES if self.dtype == "nf4" else 0

        def item(name: str) -> int:
            in_codes = self.in_float8(name) and not (self.dora and name in self.targets)  # its norms are of W unpacked
            return 1 if in_codes else self.c

        return max(self.count(name) * item(name) for name in LINEAR_MODULES) + table

    def count(self, name: str) -> int:
        """Elements of one of the seven matrices."""
        return math.prod(self.config.linear_shape(name))

    def rank(self, name: str) -> int:
        """The rank of the update of one of the seven matrices, 0 of one that is not adapted."""
        return self.adapter.rank(name) if self.adapter and name in self.targets else 0

    def normed_at_once(self, name: str) -> int:
        """The rows of W + s B A, and of W in fp32 where it is not held so, whose norms DoRA takes at once."""
        if not self.dora or name not in self.targets:
            return 0
        return 4 * min(self.count(name), NORMED_AT_ONCE[self.device]) * (1 if self.w == 4 else 2)

    def in_float8(self, name: str) -> bool:
        """Whether the products with a matrix are computed in float8."""
        shape = self.config.linear_shape(name)
        return self.dtype == "float8" and runs_in_float8(self.capability, self.computed, shape)

    def beside_product(self, name: str, rows: int, back: bool) -> int:
        """What a product of so many rows needs beside its factors and its result: the cast of the frozen matrix, the
        pieces of its unpacking, or the other factor in float8, going ``back`` with the matrix's scales in it.
        """
        if self.in_float8(name):
            width = self.config.linear_shape(name)[0 if back else 1]
            return rows * width * (1 + self.c * back) + 3 * 4 * rows
        if self.dtype == "float8":
            return 0 if self.cuda else 4 * min(self.count(name), WEIGHTS_AT_ONCE["cpu"])
        if self.quantized:
            if self.kernels:
                return 0
            return self.count(name) // 64 * 4 + 2 * min(self.count(name), WEIGHTS_AT_ONCE[self.device])
        return self.count(name) * self.c if self.casts else 0


def _capability(gpu: Gpu, computed: str, held: str) -> Capability | None:
    """Of a GPU that is not at hand: FlashAttention's oldest, for fp16, which others leave to bf16, a T4's, and for
    weights in float8 an RTX 40's.
    """
    if isinstance(gpu, tuple):
        return gpu
    usual = OLDEST_WITH_FP8 if held == "float8" else OLDEST_WITH_BF16
    return None if not gpu else (7, 5) if computed == "float16" else usual


def _float8_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) + 4 * shape[0]


def _int8_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) + 2 * shape[0]


def _nf4_bytes(shape: tuple[int, ...]) -> int:
    blocks = -(-math.prod(shape) // 64)
    return blocks * 32 + -(-blocks // 256) * 260 + 4
