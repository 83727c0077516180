"""The most bytes that are alive at any moment of a training step, found by walking through its parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.memory import fused, plain
from llamatune.memory.sizes import Part, Rows, Sizes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.config import LlamaConfig
from llamatune.shapes.levels import (
    Levels,
    Recompute,
    checkpoints_attention,
    checkpoints_feed_forward,
    is_whole,
    levels_of,
)
from llamatune.shapes.limits import LOGITS_AT_ONCE
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


class Step:
    """One step's parts, each computed once."""

    def __init__(self, spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu) -> None:
        self.z, self.mode = Sizes(spec, config, rows, cuda), spec.training.activation_checkpointing
        self._block = functools.cache(self._block_parts)

    def highest(self, levels: Levels | None = None) -> StepBytes:
        """Walk forward through the blocks and the head, back again, and over the update."""
        z, layers = self.z, self.z.config.num_hidden_layers
        chosen = levels_of(self.mode, layers) if levels is None else levels
        parts = [part for layer, level in enumerate(chosen) for part in self._block(
            level, is_whole(self.mode, layer), layer == 0, layer == layers - 1)]  # fmt: skip
        head, trained = _head(z), 4 * sum(z.trained_counts)
        gradients = trained if z.accumulates else 0
        # The angles of the rotation, token ids, labels and positions.
        kept = 2 * z.N * z.config.head_dim * 4 + 4 * z.N * 8
        moments, cached = [], 0
        for part in (*parts, head):
            moments.append((gradients, kept + cached, part.forward))
            kept, cached = kept + part.kept, cached + part.cached
        for part in (head, *reversed(parts)):
            moments.append((gradients, kept, part.backward))
            kept -= part.kept
            gradients += 0 if z.accumulates else part.gradients
        if z.trains_all:  # the gradient of the embedding
            moments.append((gradients, kept, z.N * z.D * z.s + z.V * z.D * 4))
        moments.append((trained, kept, z.update))
        gradients, kept, inside = max(moments, key=sum)
        adapter = 0 if z.trains_all else trained
        return StepBytes(z.weights, adapter, z.optimizer_state, gradients, kept, inside + z.unpacking)

    def _block_parts(self, level: Recompute, whole: bool, first: bool, last: bool) -> list[Part]:
        z = self.z
        if z.lean and level is Recompute.BLOCK:
            return [fused.block(z, last)]
        if z.lean:
            attention = fused.attention(z, level is Recompute.PROJECTIONS, last)
            feed_forward = fused.feed_forward(z, level >= Recompute.FEED_FORWARD, last)
        else:
            attention, feed_forward = plain.attention(z, first, last), plain.feed_forward(z, last)
        x, middle = z.N * z.D * z.s, (z.P if last else z.N) * z.D * z.s
        if whole:
            return [_checkpointed([attention, feed_forward], x)]
        if checkpoints_attention(self.mode):
            attention = _checkpointed([attention], x)
        if checkpoints_feed_forward(self.mode) and not z.lean:
            feed_forward = _checkpointed([feed_forward], middle)
        if not z.lean:  # what autocast caches is kept anyway where nothing is run again
            attention, feed_forward = (
                part if part.kept in (x, middle) else dataclasses.replace(part, cached=0)
                for part in (attention, feed_forward)
            )
        return [attention, feed_forward]


def _checkpointed(parts: Sequence[Part], x: int) -> Part:
    """Parts run again from their input ``x`` in the backward pass, as torch's checkpointing does it."""
    kept = backward = 0
    for part in parts:
        backward = max(backward, kept + part.forward)
        kept += part.kept
    for part in reversed(parts):
        backward = max(backward, kept + part.backward)
        kept -= part.kept
    forward = x + max(max(0, part.forward - part.kept) for part in parts)
    return Part(x, forward, backward, sum(part.gradients for part in parts), sum(part.cached for part in parts))


def _head(z: Sizes) -> Part:
    """The final norm, the head and the loss of the P predicted tokens."""
    P, D, V, c, s = z.P, z.D, z.V, z.c, z.s
    x, normed = P * D * s, P * D * 4
    cast = V * D * c if z.casts else 0
    if not z.trains_all:  # a chunk of logits at a time; the gradient is made at once
        chunk = min(P, max(1, LOGITS_AT_ONCE[z.device] // V))
        logits = chunk * V * (4 + c if c < 4 else 4) + chunk * D * c * (2 if s != c else 1)
        forward = (x if s < 4 else 0) + normed + x + max(2 * P * D * 4, x + cast + logits)
        return Part(normed + x, forward, max(x, 5 * P * D * 4), 0)
    logits, narrow = P * V * 4, P * V * c if z.autocast else 0
    kept = 2 * normed + P * D * c + logits + (cast if z.autocast else 0)
    weight = V * D * ((c if z.autocast else 0) + (4 if z.autocast or z.accumulates else 0))
    backward = max(2 * logits, logits + narrow + P * D * (c + s), narrow + weight + P * D * (c + s))
    gradients = 0 if z.config.tie_word_embeddings else V * D * 4
    return Part(kept, kept + (x if z.autocast else 0) + logits, backward, gradients)
