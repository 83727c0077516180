"""The 8-bit AdamW update rule (Dettmers et al. 2022): 2.03 bytes of state a parameter instead of 8."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.blockwise_8bit import BLOCK, BlockwiseCode
from llamatune.shapes.tile_sizes import ELEMENTS_AT_ONCE
from llamatune.training.optimizers.optimizer import AdamW, State

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep their state in fp32, as in bitsandbytes: they save next to nothing."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter, flat, with its slice of the state (views)."""

    weights: Tensor
    grad: Tensor
    state: State


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """AdamW with its two moments in 8 bits, in blocks of 256 elements.

    Each update decodes the moments to fp32, updates weights and moments, and encodes the moments again, for as many
    parameters at once as fit in a bucket: few kernels, however many matrices LoRA has.

    State: ``step`` (fp32, on the CPU), ``exp_avg`` and ``exp_avg_sq`` (uint8, padded to whole blocks) with
    ``exp_avg_largest`` and ``exp_avg_sq_largest`` (fp32, one for each block); of a small tensor the moments in fp32.
    """

    _codes: dict[torch.device, tuple[BlockwiseCode, BlockwiseCode]] = field(default_factory=dict, init=False)

    def fresh_state(self, parameter: Tensor) -> State:
        """Both moments zero, since the blocks' largest magnitudes are."""
        count = parameter.numel()
        return zero_state(count, count >= SMALLEST_QUANTIZED, parameter.device)

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        alike: dict[tuple[bool, int], list[Piece]] = defaultdict(list)
        for weight, grad, state in zip(weights, grads, states, strict=True):
            state["step"] += 1
            large = weight.numel() >= SMALLEST_QUANTIZED
            alike[large, int(state["step"])] += pieces_of(weight, grad, state, large)
        self.update_pieces(alike, learning_rate)

    def update_pieces(self, alike: Mapping[tuple[bool, int], Iterable[Piece]], learning_rate: float) -> None:
        """Update weights and states, given by whether the state is quantised, and by the number of this step."""
        for (large, step), pieces in alike.items():
            for bucket in _buckets(pieces):
                self._update_bucket(bucket, learning_rate, step, large)

    def _update_bucket(self, bucket: list[Piece], learning_rate: float, step: int, large: bool) -> None:
        """Equation 12 of AdamW on all pieces of the bucket, concatenated."""
        beta1, beta2 = self.betas
        grad = torch.cat([piece.grad for piece in bucket])
        first, second = (self._joined(bucket, name, large) for name in ("exp_avg", "exp_avg_sq"))
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # From the fp32 moments: only the stored ones are rounded.
        root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(self.eps)
        change = torch.div(first, root, out=root).mul_(-learning_rate / (1 - beta1**step))
        weights = [piece.weights for piece in bucket]
        if self.weight_decay:
            torch._foreach_mul_(weights, 1 - learning_rate * self.weight_decay)
        parts = torch.split(change, [len(piece.grad) for piece in bucket])
        torch._foreach_add_(weights, [part[: len(w)] for part, w in zip(parts, weights, strict=True)])
        self._store(bucket, "exp_avg", first, large)
        self._store(bucket, "exp_avg_sq", second, large)

    def _code(self, name: str, device: torch.device) -> BlockwiseCode:
        if device not in self._codes:
            self._codes[device] = BlockwiseCode(True, device), BlockwiseCode(False, device)
        return self._codes[device][0 if name == "exp_avg" else 1]

    def _joined(self, bucket: list[Piece], name: str, large: bool) -> Tensor:
        """One moment of the whole bucket, fp32."""
        moment = torch.cat([piece.state[name] for piece in bucket])
        if not large:
            return moment
        largest = torch.cat([piece.state[f"{name}_largest"] for piece in bucket])
        return self._code(name, moment.device).decode(moment, largest)

    def _store(self, bucket: list[Piece], name: str, moment: Tensor, large: bool) -> None:
        tensors = {name: moment}
        if large:
            tensors[name], tensors[f"{name}_largest"] = self._code(name, moment.device).encode(moment)
        for key, tensor in tensors.items():
            into = [piece.state[key] for piece in bucket]
            torch._foreach_copy_(into, list(torch.split(tensor, [len(part) for part in into])))


def zero_state(count: int, quantized: bool, device: torch.device) -> State:
    """The state of ``count`` elements before the first step."""
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    blocks = -(-count // BLOCK)
    for name in ("exp_avg", "exp_avg_sq"):
        if quantized:
            state[name] = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=device)
            state[f"{name}_largest"] = torch.zeros(blocks, dtype=torch.float32, device=device)
        else:
            state[name] = torch.zeros(count, dtype=torch.float32, device=device)
    return state


def pieces_of(weight: Tensor, grad: Tensor, state: State, large: bool) -> Iterator[Piece]:
    """The parameter cut into runs that fit a bucket; gradients of large parameters are padded to whole blocks."""
    assert weight.is_contiguous()
    weights, grad = weight.view(-1), grad.reshape(-1).float()
    size = ELEMENTS_AT_ONCE[weight.device.type]
    for begin in range(0, len(weights), size):
        run, blocks = slice(begin, begin + size), slice(begin // BLOCK, (begin + size) // BLOCK)
        part = grad[run]
        if large:
            part = F.pad(part, (0, -len(part) % BLOCK))
        views = {
            key: tensor[blocks if key.endswith("_largest") else run] for key, tensor in state.items() if key != "step"
        }
        yield Piece(weights[run], part, views)


def _buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in their order, as many as fit."""
    bucket: list[Piece] = []
    elements = 0
    for piece in pieces:
        if bucket and elements + len(piece.grad) > ELEMENTS_AT_ONCE[piece.grad.device.type]:
            yield bucket
            bucket, elements = [], 0
        bucket.append(piece)
        elements += len(piece.grad)
    if bucket:
        yield bucket
