"""The peak memory of a training step and its moments, from a walk through the parts of the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from llamatune.memory import lean_block, plain_block
from llamatune.memory.checkpointing import Checkpointed
from llamatune.memory.ledger import Moment, Part, Walk
from llamatune.memory.loss import FrozenHead, TrainedHead
from llamatune.memory.sizes import Rows, Sizes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.config import ATTENTION_MODULES, FEED_FORWARD_MODULES, LlamaConfig
from llamatune.shapes.levels import (
    Levels,
    Recompute,
    checkpoints_attention,
    checkpoints_feed_forward,
    is_whole,
    levels_of,
)
from llamatune.spec import RunSpec


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the highest moment of a steady step, by what they are.

    ``weights`` are the base; ``adapter`` LoRA's matrices; ``activations`` what is kept for the backward pass;
    ``temporary`` what the running part has in flight, and the buffer that NF4 matrices are unpacked into.
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


def step_bytes(spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu, levels: Levels | None = None) -> StepBytes:
    """The memory of a step whose micro-batches are ``rows``; ``levels`` in place of ``activation_checkpointing``'s."""
    return Step(spec, config, rows, cuda).highest(levels)


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

    ``gradients`` are those made so far; ``others`` what other parts keep, and casts that autocast keeps. ``layer`` is
    one of ``layers``, which follow one another and are alike; the head counts as the layer behind the last.
    """

    total: int
    gradients: int
    others: int
    phase: str
    layer: int
    layers: range
    part: Part


class Step:
    """One step's parts, each walked once."""

    def __init__(self, spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu) -> None:
        z = self.z = Sizes(spec, config, rows, cuda)
        self.mode, self.layers = spec.training.activation_checkpointing, config.num_hidden_layers
        self._block = functools.cache(self._block_parts)
        if not z.trains_all:
            self._head = Part.of("head", FrozenHead(z), 0)
        else:
            self._head = Part.of("head", TrainedHead(z), 0 if config.tie_word_embeddings else z.V * z.D * 4)
        self._embedding = Part.moment(
            "embedding", "gradient", "gradients of the embedding and of x", z.N * z.D * z.s + z.V * z.D * 4
        )
        self._update = Part.moment("optimizer", "update", "gradients and state in fp32", z.update)
        # The angles of the rotation, token ids, labels and positions.
        self._inputs = 2 * z.N * config.head_dim * 4 + 4 * z.N * 8
        self._trained = 4 * sum(z.trained_counts)

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
            layers = tuple(sorted({layer for placed in group for layer in placed.layers if layer < self.layers}))
            top = max(group, key=itemgetter(0))
            for moment in top.part.forward if top.phase == "forward" else top.part.backward:
                memory, alive = self._categories(top, moment.bytes), self._alive(top, moment, walk)
                moments.append(StepMoment(top.phase, layers, top.part.name, moment.step, memory, alive))
        return moments

    def _walk(self, levels: Levels | None) -> list[_Placed]:
        """Forward through the blocks and the head, back again, and over the update.

        From layer to layer of a run of like ones memory grows or shrinks evenly: the ends of the run are the highest.
        """
        accumulates, walk = self.z.accumulates, []
        gradients, others, cached = self._trained if accumulates else 0, self._inputs, 0

        def place(phase: str, layer: int, layers: range, part: Part) -> None:
            forward = phase == "forward"
            peak, beside = part.forward_peak + cached if forward else part.backward_peak, others + cached * forward
            walk.append(_Placed(gradients + others + peak, gradients, beside, phase, layer, layers, part))

        runs = [*self._runs(levels), (range(self.layers, self.layers + 1), [self._head])]
        for layers, parts in runs:
            others += (len(layers) - 1) * sum(part.kept_bytes for part in parts)
            cached += (len(layers) - 1) * sum(part.cached for part in parts)
            for part in parts:
                place("forward", layers[-1], layers, part)
                others, cached = others + part.kept_bytes, cached + part.cached
        for layers, parts in reversed(runs):
            between = len(layers) - 2
            for layer in sorted({layers[0], layers[-1]}, reverse=True):
                for part in reversed(parts):
                    others -= part.kept_bytes
                    place("backward", layer, layers, part)
                    gradients += 0 if accumulates else part.gradients
                if layer == layers[-1] and between > 0:
                    others -= between * sum(part.kept_bytes for part in parts)
                    gradients += 0 if accumulates else between * sum(part.gradients for part in parts)
        if self.z.trains_all:
            place("backward", -1, range(0), self._embedding)
        gradients = self._trained
        place("update", -1, range(0), self._update)
        return walk

    def _runs(self, levels: Levels | None) -> Iterator[tuple[range, list[Part]]]:
        """Layers that follow one another and are alike, and their parts."""
        chosen = levels_of(self.mode, self.layers) if levels is None else levels
        special = not (self.z.lean or self.z.trains_all)  # no gradient leads behind the first of frozen plain blocks
        kinds = [
            (level, is_whole(self.mode, layer), special and layer == 0, layer == self.layers - 1)
            for layer, level in enumerate(chosen)
        ]
        start = 0
        for kind, run in itertools.groupby(kinds):
            layers = range(start, start := start + len(list(run)))
            yield layers, self._block(*kind)

    def _categories(self, placed: _Placed, size: int) -> StepBytes:
        """Of a moment of ``size`` bytes of a part. What it keeps counts as activations in the backward pass alone."""
        z = self.z
        kept = 0 if placed.phase == "forward" else placed.part.kept_bytes
        adapter = 0 if z.trains_all else self._trained
        return StepBytes(
            z.weights, adapter, z.optimizer_state, placed.gradients, placed.others + kept, size - kept + z.unpacking
        )

    def _alive(self, placed: _Placed, moment: Moment, walk: Sequence[_Placed]) -> dict[str, int]:
        """The bytes of all that is alive at a moment of a part, by name."""
        z = self.z
        sizes = Counter({
            "weights": z.weights, "adapter": 0 if z.trains_all else self._trained, "optimizer state": z.optimizer_state,
            "gradients": placed.gradients, "buffer of unpacked weights": z.unpacking,
            "token ids, positions, labels, rotation": self._inputs})  # fmt: skip
        before = True  # whether a part comes before this one in its layer
        for other in walk[: [other.part.name for other in walk].index("head")]:
            before &= other.layers != placed.layers or other.part is not placed.part
            layers = len(range(other.layers.start, min(other.layers.stop, placed.layer)))
            layers += before and placed.layer in other.layers
            for name, size in other.part.kept:
                sizes[f"kept by {other.part.name}: {name}"] += layers * size
            sizes["casts that autocast keeps"] += layers * other.part.cached * (placed.phase == "forward")
        for name, size in moment.tensors:
            sizes[name] += size
        return {name: size for name, size in sizes.items() if size}

    def _block_parts(self, level: Recompute, whole: bool, first: bool, last: bool) -> list[Part]:
        z = self.z
        x, y = z.N * z.D * z.s, (z.P if last else z.N) * z.D * z.s
        gradients = [z.gradients(names) for names in (ATTENTION_MODULES, FEED_FORWARD_MODULES)]
        casts = [0, 0]
        attention: Walk
        feed_forward: Walk
        if z.lean:
            attention = lean_block.Attention(z, last, level >= Recompute.PROJECTIONS)
            feed_forward = lean_block.FeedForward(z, last, level >= Recompute.FEED_FORWARD)
        else:
            attention, feed_forward = plain_block.Attention(z, first, last), plain_block.FeedForward(z, last)
            casts = [plain_block.cached_casts(z, names) for names in (ATTENTION_MODULES, FEED_FORWARD_MODULES)]
        if whole or level == Recompute.BLOCK:
            block = lean_block.RecomputedBlock(z, last) if z.lean else Checkpointed([attention, feed_forward], x)
            return [Part.of("block", block, sum(gradients), sum(casts))]
        halves: list[Walk] = [attention, feed_forward]
        if checkpoints_attention(self.mode):
            halves[0] = Checkpointed([attention], x)
        if checkpoints_feed_forward(self.mode) and not z.lean:
            halves[1] = Checkpointed([feed_forward], y)
        # What autocast caches is kept anyway where nothing is run again.
        casts = [cast if isinstance(half, Checkpointed) else 0 for cast, half in zip(casts, halves, strict=True)]
        return [Part.of(*of) for of in zip(("attention", "feed-forward"), halves, gradients, casts, strict=True)]
