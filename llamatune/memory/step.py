"""The peak memory of a training step and its moments, from a walk through the parts of the step."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from llamatune.memory import fused_block, plain_block
from llamatune.memory.activation_checkpointing import checkpointed
from llamatune.memory.ledger import Moment, Part, Walk
from llamatune.memory.loss import frozen_head, trained_head
from llamatune.memory.sizes import Rows, Sizes
from llamatune.shapes.attention_kernels import Gpu, beyond_window
from llamatune.shapes.llama_config import ATTENTION_MODULES, FEED_FORWARD_MODULES, LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import (
    ATTENTION_MODES,
    FEED_FORWARD_MODES,
    Levels,
    Recompute,
    is_whole,
    levels_of,
)
from llamatune.spec import RunSpec


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the highest moment of a steady step, by what they are.

    ``weights`` are the base; ``adapter`` LoRA's matrices and, on a GPU, their casts; ``activations`` what is kept for
    the backward pass; ``temporary`` what the running part has in flight, and the buffer that quantised matrices are
    unpacked into.
    """

    weights: int
    adapter: int
    optimizer_state: int
    gradients: int
    activations: int
    temporary: int

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class StepMoment:
    """The highest moment of one step of a part, at the layer where it is highest of ``layers``, which are alike.

    ``phase`` is ``forward``, ``backward`` or ``update``; ``alive`` the bytes of all that is there, by name.
    """

    phase: str
    layers: tuple[int, ...]
    part: str
    step: str
    memory: StepBytes
    alive: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """For JSON, without what is alive."""
        return {
            "phase": self.phase,
            "layers": list(self.layers),
            "part": self.part,
            "step": self.step,
            "bytes": self.memory.peak,
            "memory_bytes": dataclasses.asdict(self.memory),
        }


class _Placed(NamedTuple):
    """A part in one pass of a step: ``total`` is its highest moment with what is alive beside it.

    ``gradients`` are the bytes of those made so far, ``others`` of the inputs and of the first ``below`` parts of the
    step: what they keep, and in the forward pass the casts that autocast keeps. ``layer`` is None outside the blocks.
    """

    total: int
    gradients: int
    others: int
    below: int
    phase: str
    layer: int | None
    part: Part


class Step:
    """One step's parts, each walked once."""

    def __init__(self, spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu) -> None:
        z = self.z = Sizes(spec, config, rows, cuda)
        self.mode, self.layers = spec.training.activation_checkpointing, config.num_hidden_layers
        self._block = functools.cache(self._block_parts)
        own_gradient = z.trains_head and not (z.trains_all and config.tie_word_embeddings)
        head_gradients = 4 * (z.V * z.D * own_gradient + z.D * z.trains_norm)
        self._head = Part.of("head", partial(trained_head if z.trains_head else frozen_head, z=z), head_gradients)
        in_fp32 = z.N * z.D * 4 if z.s < 4 else 0
        self._embedding = Part.moment(
            "embedding", "gradient", "gradients of the embedding and of x", z.N * z.D * z.s + in_fp32 + z.V * z.D * 4
        )
        self._update = Part.moment("optimizer", "update", "gradients and state in fp32", z.update)
        # The angles of the rotation, token ids, labels and positions; the masks of the sliding window.
        masks = sum(t * -(-t // 8) * 8 * z.c for t in beyond_window(z.lengths, config.sliding_window))
        self._inputs = 2 * z.N * config.head_dim * 4 + 4 * z.N * 8 + masks
        self._trained = 4 * sum(z.trained_counts) // z.slices
        self._adapter = z.trained_bytes + z.window_casts

    def highest(self, levels: Levels | None = None) -> StepBytes:
        """The bytes at the peak of a step whose blocks recompute ``levels``, by default the mode's."""
        top = max(self._walk(levels), key=itemgetter(0))
        return self._categories(top, top.total - top.gradients - top.others)

    def moments(self, levels: Levels | None = None) -> list[StepMoment]:
        """Every moment of the walk; parts that are alike are one, at the layer where they are highest."""
        walk = self._walk(levels)
        alike: dict[tuple[str, int], list[_Placed]] = {}
        for placed in walk:
            alike.setdefault((placed.phase, id(placed.part)), []).append(placed)
        moments = []
        for group in alike.values():
            layers = tuple(sorted(placed.layer for placed in group if placed.layer is not None))
            top = max(group, key=itemgetter(0))
            for moment in top.part.forward if top.phase == "forward" else top.part.backward:
                memory, alive = self._categories(top, moment.bytes), self._alive(top, moment, walk)
                moments.append(StepMoment(top.phase, layers, top.part.name, moment.step, memory, alive))
        return moments

    def _walk(self, levels: Levels | None) -> list[_Placed]:
        """Forward through the blocks and the head, back again, and over the update."""
        parts = [*self._parts_of_blocks(levels), (None, self._head)]
        gradients = self._trained * (self.z.held_sums + self.z.accumulates)
        others, cached = self._inputs, 0
        walk: list[_Placed] = []

        def place(phase: str, beside: int, peak: int, below: int, layer: int | None, part: Part) -> None:
            walk.append(_Placed(gradients + beside + peak, gradients, beside, below, phase, layer, part))

        for below, (layer, part) in enumerate(parts):
            place("forward", others + cached, part.forward_peak, below, layer, part)
            others, cached = others + part.kept_bytes, cached + part.cached
        for below, (layer, part) in reversed([*enumerate(parts)]):
            others -= part.kept_bytes
            place("backward", others, part.backward_peak, below, layer, part)
            gradients += 0 if self.z.accumulates else part.gradients
        if self.z.trains_embedding:
            place("backward", others, self._embedding.backward_peak, 0, None, self._embedding)
        gradients = self._trained
        place("update", others, self._update.backward_peak, 0, None, self._update)
        return walk

    def _parts_of_blocks(self, levels: Levels | None) -> Iterator[tuple[int, Part]]:
        special = not (self.z.fused or self.z.trains_embedding)  # no gradient leads behind the first plain block
        for layer, level in enumerate(levels or levels_of(self.mode, self.layers)):
            first, last = special and layer == 0, layer == self.layers - 1
            for part in self._block(level, is_whole(self.mode, layer), first, last):
                yield layer, part

    def _categories(self, placed: _Placed, size: int) -> StepBytes:
        """Of a moment of ``size`` bytes of a part. What it keeps counts as activations in the backward pass alone."""
        z = self.z
        kept = 0 if placed.phase == "forward" else placed.part.kept_bytes
        activations, temporary = placed.others + kept, size - kept + z.unpacking + z.exchanged
        return StepBytes(z.weights, self._adapter, z.optimizer_state, placed.gradients, activations, temporary)

    def _alive(self, placed: _Placed, moment: Moment, walk: Sequence[_Placed]) -> dict[str, int]:
        """The bytes of all that is alive at a moment of a part, by name."""
        z = self.z
        sizes = Counter({
            "weights": z.weights, "adapter": self._adapter, "optimizer state": z.optimizer_state,
            "gradients": placed.gradients, "buffer of unpacked weights": z.unpacking,
            "gradients that are added up over ranks": z.exchanged,
            "token ids, positions, labels, rotation": self._inputs})  # fmt: skip
        for below in walk[: placed.below]:
            for name, size in below.part.kept:
                sizes[f"kept by {below.part.name}: {name}"] += size
            sizes["casts that autocast keeps"] += below.part.cached * (placed.phase == "forward")
        for name, size in moment.tensors:
            sizes[name] += size
        return {name: size for name, size in sizes.items() if size}

    def _block_parts(self, level: Recompute, whole: bool, first: bool, last: bool) -> list[Part]:
        z = self.z
        if z.fused:
            attention = partial(fused_block.attention, z=z, last=last, recompute=level >= Recompute.PROJECTIONS)
            feed_forward = partial(fused_block.feed_forward, z=z, last=last, recompute=level >= Recompute.FEED_FORWARD)
        else:
            attention = partial(plain_block.attention, z=z, first=first, last=last)
            feed_forward = partial(plain_block.feed_forward, z=z, last=last)

        def run_again(name: str, walks: list[Walk], modules: Sequence[str], rows: int) -> Part:
            walk = partial(checkpointed, walks=walks, input_bytes=rows * z.D * z.s)
            # What autocast caches is kept anyway where nothing is run again.
            return Part.of(name, walk, z.gradients(modules), plain_block.cached_casts(z, modules))

        if z.fused and level == Recompute.BLOCK:
            block = partial(fused_block.recomputed_block, z=z, last=last)
            return [Part.of("block", block, z.gradients(LINEAR_MODULES))]
        if not z.fused and whole:
            return [run_again("block", [attention, feed_forward], LINEAR_MODULES, z.N)]
        halves = [
            Part.of("attention", attention, z.gradients(ATTENTION_MODULES)),
            Part.of("feed-forward", feed_forward, z.gradients(FEED_FORWARD_MODULES)),
        ]
        if self.mode in ATTENTION_MODES:
            halves[0] = run_again("attention", [attention], ATTENTION_MODULES, z.N)
        if self.mode in FEED_FORWARD_MODES and not z.fused:
            halves[1] = run_again("feed-forward", [feed_forward], FEED_FORWARD_MODULES, z.P if last else z.N)
        return halves
