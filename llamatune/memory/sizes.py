"""Sizes of a step in elements and bytes: what follows from a spec and a model's shape alone.

Letters as in ``model_sizes``, and N tokens in the row of a micro-batch, P of them predicted; ``s`` bytes an element of
the residual stream.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.memory.model_sizes import CODE_TABLE_BYTES, ModelSizes
from llamatune.shapes.adapter import WHOLE_MODULES
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.dtypes import PRECISIONS, QUANTIZED_DTYPES
from llamatune.shapes.gradient_lanes import LANES
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.recurring_sizes import filled_up
from llamatune.shapes.tile_sizes import ELEMENTS_AT_ONCE
from llamatune.spec import RunSpec


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


class Sizes(ModelSizes):
    """The sizes of one step of ``spec`` on a model of this shape."""

    def __init__(self, spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu) -> None:
        training = spec.training
        held = spec.model.dtype
        if held in QUANTIZED_DTYPES:  # of what is not
            held = "float16" if training.precision == "fp16" else "bfloat16"
        computed = PRECISIONS[training.precision]
        super().__init__(config, spec.model.dtype, held, computed, spec.adapter, cuda, training.kernels == "auto")
        self.spec, self.rows = spec, rows
        kind = self.adapter.kind if self.adapter else None
        self.trains_A, self.from_base = kind != "lora_fa", kind in ("pissa", "olora")
        self.trains_all, self.dropout = self.adapter is None, bool(self.adapter and self.adapter.dropout)
        whole = self.adapter.whole if self.adapter else tuple(WHOLE_MODULES)
        self.trains_embedding, self.trains_norm = "embed_tokens" in whole, "norm" in whole
        self.trains_head = "lm_head" in whole
        self.slices = rows.ranks if self.trains_all else 1  # of weights, gradients and optimizer state
        self.fused = self.adapter is not None and training.fused
        passes, lanes = rows.passes or training.gradient_accumulation_steps, LANES if self.adapter else 1
        self.accumulates = passes > lanes  # into gradients that are there already
        self.held_sums = (min(passes, lanes) - 1).bit_length()  # of gradients of other lanes
        self.autocast = computed != "float32"
        self.s = 4 if self.casts else self.w  # by the table in training.precision
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
        others = (self.other_parameters - self._replaced) * self.w
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

    @functools.cached_property
    def optimizer_state(self) -> int:
        training, counts, slices = self.spec.training, self.trained_counts, self.slices
        if training.optimizer == "sgd":
            return 4 * sum(counts) // slices if training.momentum else 0
        if training.optimizer == "adamw":
            return 8 * sum(counts) // slices + 4 * len(counts)
        blocks = (2 * -(-count // 256) * 260 if count >= 4096 else 8 * count for count in counts)
        return sum(blocks) // slices + 2 * CODE_TABLE_BYTES

    @property
    def update(self) -> int:
        """What the optimizer has in flight: AdamW in fp32, or by a kernel, works in place, in 8 bits on a bucket."""
        if self.spec.training.optimizer != "adamw_8bit" or self.kernels:
            return 0
        trained = sum(self.trained_counts) // self.slices  # gradients filled up to whole blocks
        return 4 * trained + 29 * min(trained, ELEMENTS_AT_ONCE[self.device])

    # Pieces of a pass.

    def gradients(self, names: Sequence[str]) -> int:
        """The fp32 gradients of what is trained in these layers of one block."""
        if self.adapter is None:
            return 4 * sum(map(self.count, names)) // self.slices
        return sum(4 * self.adapter.trained_count(self.config, name) for name in names)
