"""Sizes of a step in elements and bytes: what follows from a spec and a model's shape alone.

Letters as in ``model``: N tokens in the row of a micro-batch, P of them predicted, D hidden, Q and K the widths of all
query and of all key-value heads, F feed-forward, V vocabulary. Lower case for bytes an element: ``w`` of a held
weight, ``c`` of what products are computed in, ``s`` of the residual stream.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.shapes.adapter import WHOLE_MODULES
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.capabilities import OLDEST_FOR_TRITON, OLDEST_WITH_BF16, OLDEST_WITH_FP8, Capability
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.dtypes import PRECISIONS, QUANTIZED_DTYPES, WEIGHT_BYTES
from llamatune.shapes.float8_products import runs_in_float8
from llamatune.shapes.gradient_lanes import LANES
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_module
from llamatune.shapes.recurring_sizes import filled_up
from llamatune.shapes.tile_sizes import ELEMENTS_AT_ONCE, NORMED_AT_ONCE, WEIGHTS_AT_ONCE
from llamatune.spec import RunSpec

_CODE_TABLE_BYTES = 4 << 16  # what finds the level of an 8-bit blockwise code


@dataclass(frozen=True)
class Rows:
    """A pass: samples of these lengths one after another, of whose tokens ``targets`` are predicted.

    ``passes`` are those of its accumulation window; None: as many as the spec has micro-batches. ``ranks`` are the
    processes among which a base in shards is divided, and all that is trained where every parameter is.
    """

    lengths: tuple[int, ...]
    targets: int
    passes: int | None = None
    ranks: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Sizes:
    """The sizes of one step of ``spec`` on a model of this shape."""

    def __init__(self, spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu) -> None:
        training = spec.training
        self.spec, self.config, self.rows, self.cuda = spec, config, rows, bool(cuda)
        self.device = "cuda" if cuda else "cpu"
        self.D, self.F, self.V = config.hidden_size, config.intermediate_size, config.vocab_size
        self.Q, self.K = config.linear_shape("q_proj")[0], config.linear_shape("k_proj")[0]
        self.normed = self.Q + self.K if config.head_norms else 0  # widths of what has norms of heads
        self.adapter = spec.adapter
        self.targets = frozenset(self.adapter.target_modules) if self.adapter else frozenset()
        kind = self.adapter.kind if self.adapter else None
        self.dora, self.trains_A, self.from_base = kind == "dora", kind != "lora_fa", kind in ("pissa", "olora")
        self.trains_all, self.dropout = self.adapter is None, bool(self.adapter and self.adapter.dropout)
        whole = self.adapter.whole if self.adapter else tuple(WHOLE_MODULES)
        self.trains_embedding, self.trains_norm = "embed_tokens" in whole, "norm" in whole
        self.trains_head = "lm_head" in whole
        self.slices = rows.ranks if self.trains_all else 1  # of weights, gradients and optimizer state
        self.fused = self.adapter is not None and training.fused
        passes, lanes = rows.passes or training.gradient_accumulation_steps, LANES if self.adapter else 1
        self.accumulates = passes > lanes  # into gradients that are there already
        self.held_sums = (min(passes, lanes) - 1).bit_length()  # of gradients of other lanes
        self.quantized, self.computed = spec.model.dtype in QUANTIZED_DTYPES, PRECISIONS[training.precision]
        self.autocast = self.computed != "float32"
        held = spec.model.dtype
        if self.quantized:  # of what is not
            held = "float16" if training.precision == "fp16" else "bfloat16"
        self.w, self.c = WEIGHT_BYTES[held], WEIGHT_BYTES[self.computed]
        self.capability = _capability(cuda, self.computed, spec.model.dtype)
        self.kernels = training.kernels == "auto" and (self.capability or (0, 0)) >= OLDEST_FOR_TRITON
        self.casts = held != self.computed  # by the table in training.precision
        self.s = 4 if self.casts else self.w
        self.N, self.P = (
            filled_up(count, self.device, self.c) for count in (rows.tokens, min(rows.targets, rows.tokens))
        )
        self.lengths = (*rows.lengths, self.N - rows.tokens) if rows.tokens < self.N else rows.lengths

    def adds_in_products(self, name: str) -> bool:
        """Whether the product of a matrix is added to the residual stream in one kernel."""
        return self.cuda and self.s == self.c and not (self.dora and name in self.targets)

    # Allocated between steps.

    @functools.cached_property
    def trained_counts(self) -> list[int]:
        """Elements of each trained tensor."""
        if self.adapter is None:
            return [math.prod(shape) for _, shape in self.config.parameter_shapes()]
        modules = [self.adapter.trained_shapes(self.config, name) for name in self.adapter.target_modules]
        counts = [math.prod(shape) for shapes in modules for shape in shapes.values()] * self.config.num_hidden_layers
        return counts + self._whole_counts

    @functools.cached_property
    def adapter_count(self) -> int:
        """Elements of the adapter, those that are not trained too."""
        if self.adapter is None:
            return 0
        counts = (self.adapter.parameter_count(self.config, name) for name in self.adapter.target_modules)
        return sum(counts) * self.config.num_hidden_layers

    @functools.cached_property
    def _whole_counts(self) -> list[int]:
        """Elements of what is trained whole beside an adapter."""
        shapes = self.adapter.whole_shapes(self.config) if self.adapter else {}
        return list(map(math.prod, shapes.values()))

    @property
    def trained_bytes(self) -> int:
        """The adapter's tensors and what is trained whole, in fp32; without an adapter all that is trained is base."""
        return 4 * (self.adapter_count + sum(self._whole_counts))

    @property
    def _replaced(self) -> int:
        """Elements of the base that make room for what is trained whole; one of a tied pair leaves the other there."""
        unties = self.adapter is not None and self.adapter.unties(self.config)
        return sum(self._whole_counts) - (self.V * self.D if unties else 0)

    @functools.cached_property
    def weights(self) -> int:
        """The base as it is held on the device: with streamed blocks two rooms, and what lies there of the blocks."""
        layers, placement = self.config.num_hidden_layers, self.spec.model.placement
        others = count_parameters(self.config).base_parameters - self.block_parameters * layers - self._replaced
        others *= self.w
        if self.slices > 1:  # beside the slice, what is gathered: all outside the blocks, and at most three of them
            return -(-(others + self.block * layers) // self.slices) + others + 3 * self.block
        if placement not in ("host", "shard"):
            return others + self.block * layers
        at_rest = (
            self.block * layers // self.rows.ranks if placement == "shard" else 0 if self.cuda else self.block * layers
        )
        return others + at_rest + self.block * min(2, layers)

    @property
    def window_casts(self) -> int:
        """What is kept for a window: on a GPU LoRA's matrices in the dtype of products; DoRA's norms and factors."""
        if self.dora:
            return self.config.num_hidden_layers * sum(map(self._of_dora_for_window, self.targets))
        return self.c * self.adapter_count if self.fused and self.cuda and self.c < 4 else 0

    def _of_dora_for_window(self, name: str) -> int:
        out, in_ = self.config.linear_shape(name)
        if not self.fused:
            return 4 * out  # the norms
        casts = self.rank(name) * (out + in_ * (self.c < 4)) + out  # g · B, A and g - 1
        return self.c * casts + 2 * 4 * out

    @property
    def exchanged(self) -> int:
        """Gradients of two blocks, whole, that are being added up over the ranks, where each keeps a slice."""
        return 2 * self.block if self.slices > 1 else 0

    @property
    def block(self) -> int:
        """The frozen tensors of a block."""
        if not self.quantized:
            return self.block_parameters * self.w
        held = {"nf4": _nf4_bytes, "float8": _float8_bytes, "int8": _int8_bytes}[self.spec.model.dtype]
        return sum(held(self.config.linear_shape(name)) for name in LINEAR_MODULES) + self._vectors * self.w

    @property
    def block_parameters(self) -> int:
        return sum(self.count(name) for name in LINEAR_MODULES) + self._vectors

    @functools.cached_property
    def _vectors(self) -> int:
        """Elements of the norms and biases of a block."""
        shapes = self.config.with_layers(1).parameter_shapes()
        return sum(math.prod(shape) for name, shape in shapes if ".layers." in name and not linear_module(name))

    @functools.cached_property
    def optimizer_state(self) -> int:
        training, counts, slices = self.spec.training, self.trained_counts, self.slices
        if training.optimizer == "sgd":
            return 4 * sum(counts) // slices if training.momentum else 0
        if training.optimizer == "adamw":
            return 8 * sum(counts) // slices + 4 * len(counts)
        blocks = (2 * -(-count // 256) * 260 if count >= 4096 else 8 * count for count in counts)
        return sum(blocks) // slices + 2 * _CODE_TABLE_BYTES

    @property
    def update(self) -> int:
        """What the optimizer has in flight: AdamW in fp32, or by a kernel, works in place, in 8 bits on a bucket."""
        if self.spec.training.optimizer != "adamw_8bit" or self.kernels:
            return 0
        trained = sum(self.trained_counts) // self.slices  # gradients filled up to whole blocks
        return 4 * trained + 29 * min(trained, ELEMENTS_AT_ONCE[self.device])

    @property
    def unpacking(self) -> int:
        """The buffer that quantised matrices are unpacked into, and NF4's table for their scales; they stay."""
        if not self.quantized:
            return 0
        table = _CODE_TABLE_BYTES if self.spec.model.dtype == "nf4" else 0

        def item(name: str) -> int:
            in_codes = self.in_float8(name) and not (self.dora and name in self.targets)  # its norms are of W unpacked
            return 1 if in_codes else self.c

        return max(self.count(name) * item(name) for name in LINEAR_MODULES) + table

    # Pieces of a pass.

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
        return self.spec.model.dtype == "float8" and runs_in_float8(self.capability, self.computed, shape)

    def beside_product(self, name: str, rows: int, back: bool) -> int:
        """What a product of so many rows needs beside its factors and its result: the cast of the frozen matrix, the
        pieces of its unpacking, or the other factor in float8, going ``back`` with the matrix's scales in it.
        """
        if self.in_float8(name):
            width = self.config.linear_shape(name)[0 if back else 1]
            return rows * width * (1 + self.c * back) + 3 * 4 * rows
        if self.spec.model.dtype == "float8":
            return 0 if self.cuda else 4 * min(self.count(name), WEIGHTS_AT_ONCE["cpu"])
        if self.quantized:
            if self.kernels:
                return 0
            return self.count(name) // 64 * 4 + 2 * min(self.count(name), WEIGHTS_AT_ONCE[self.device])
        return self.count(name) * self.c if self.casts else 0

    def gradients(self, names: Sequence[str]) -> int:
        """The fp32 gradients of what is trained in these layers of one block."""
        if self.adapter is None:
            return 4 * sum(map(self.count, names)) // self.slices
        return sum(4 * self.adapter.trained_count(self.config, name) for name in names)


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
