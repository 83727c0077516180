"""The 8-bit AdamW update rule (Dettmers et al. 2022): 2.03 bytes of state a parameter instead of 8."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.blockwise_8bit import BLOCK, BlockwiseCode
from llamatune.model.kernels.choice import by_kernel
from llamatune.shapes.tile_sizes import ELEMENTS_AT_ONCE
from llamatune.training.optimizers.optimizer import AdamW, State

Codes = tuple[BlockwiseCode, BlockwiseCode]
"""Of the first moment, which has signs, and of the second."""

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep their state in fp32, as in bitsandbytes: they save next to nothing."""


class Numbers(NamedTuple):
    """What all elements of one update share.

    ``root`` divides the root of the second moment: sqrt(1 - beta2^step). ``rate`` is the learning rate over
    1 - beta1^step, ``kept`` the share of the weights that decay leaves.
    """

    beta1: float
    beta2: float
    root: float
    eps: float
    rate: float
    kept: float


@dataclass(frozen=True)
class Run:
    """Elements of one parameter, flat, with their gradient and their state (views): whole blocks, or the end of one."""

    weights: Tensor
    grad: Tensor
    state: State


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """AdamW with its two moments in 8 bits, in blocks of 256 elements.

    State: ``step`` (fp32, on the CPU), ``exp_avg`` and ``exp_avg_sq`` (uint8, padded to whole blocks) with
    ``exp_avg_largest`` and ``exp_avg_sq_largest`` (fp32, one for each block); of a small tensor the moments in fp32.
    """

    _codes: dict[torch.device, Codes] = field(default_factory=dict, init=False)

    def fresh_state(self, parameter: Tensor) -> State:
        """Both moments zero, since the blocks' largest magnitudes are."""
        count = parameter.numel()
        return zero_state(count, count >= SMALLEST_QUANTIZED, parameter.device)

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        alike: dict[tuple[bool, int], list[Run]] = defaultdict(list)
        for weight, grad, state in zip(weights, grads, states, strict=True):
            assert weight.is_contiguous()
            state["step"] += 1
            large = weight.numel() >= SMALLEST_QUANTIZED
            alike[large, int(state["step"])].append(Run(weight.view(-1), grad.reshape(-1), state))
        self.update_runs(alike, learning_rate)

    def update_runs(self, alike: Mapping[tuple[bool, int], Sequence[Run]], learning_rate: float) -> None:
        """Update weights and states, given by whether the state is quantised, and by the number of this step."""
        beta1, beta2 = self.betas
        for (large, step), runs in alike.items():
            if not runs:
                continue
            weights, grads, states = ([getattr(run, key) for run in runs] for key in ("weights", "grad", "state"))
            root, rate = math.sqrt(1 - beta2**step), learning_rate / (1 - beta1**step)
            numbers = Numbers(beta1, beta2, root, self.eps, rate, 1 - learning_rate * self.weight_decay)
            if large:
                update_quantized(weights, grads, states, self._codes_on(weights[0].device), numbers)
            else:
                _update_in_buckets(weights, grads, states, None, numbers)

    def _codes_on(self, device: torch.device) -> Codes:
        if device not in self._codes:
            self._codes[device] = BlockwiseCode(True, device), BlockwiseCode(False, device)
        return self._codes[device]


@by_kernel("adamw_8bit")
def update_quantized(
    weights: list[Tensor], grads: list[Tensor], states: list[State], codes: Codes, numbers: Numbers
) -> None:
    """Equation 12 of AdamW on flat tensors whose moments are in 8 bits: decoded to fp32, updated and encoded again."""
    _update_in_buckets(weights, grads, states, codes, numbers)


def _update_in_buckets(
    weights: list[Tensor], grads: list[Tensor], states: list[State], codes: Codes | None, numbers: Numbers
) -> None:
    """As many elements at once as fit in a bucket: few kernels, however many matrices LoRA has.

    Without ``codes`` the moments are in fp32.
    """
    beta1, beta2, root, eps, rate, kept = numbers
    cut = [_pieces(*run, codes is not None) for run in zip(weights, grads, states, strict=True)]
    for bucket in _buckets(list(itertools.chain.from_iterable(cut))):
        grad = torch.cat([piece.grad for piece in bucket])
        first, second = _joined(bucket, "exp_avg", codes), _joined(bucket, "exp_avg_sq", codes)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # From the fp32 moments: only the stored ones are rounded.
        slope = second.sqrt().div_(root).add_(eps)
        change = torch.div(first, slope, out=slope).mul_(-rate)
        parts = [piece.weights for piece in bucket]
        if kept != 1:
            torch._foreach_mul_(parts, kept)
        changes = torch.split(change, [len(piece.grad) for piece in bucket])
        torch._foreach_add_(parts, [part[: len(w)] for part, w in zip(changes, parts, strict=True)])
        _store(bucket, "exp_avg", first, codes)
        _store(bucket, "exp_avg_sq", second, codes)


def _joined(bucket: list[Run], name: str, codes: Codes | None) -> Tensor:
    """One moment of the whole bucket, fp32."""
    moment = torch.cat([piece.state[name] for piece in bucket])
    if codes is None:
        return moment
    largest = torch.cat([piece.state[f"{name}_largest"] for piece in bucket])
    return codes[name == "exp_avg_sq"].decode(moment, largest)


def _store(bucket: list[Run], name: str, moment: Tensor, codes: Codes | None) -> None:
    tensors = {name: moment}
    if codes is not None:
        tensors[name], tensors[f"{name}_largest"] = codes[name == "exp_avg_sq"].encode(moment)
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


def _pieces(weights: Tensor, grad: Tensor, state: State, large: bool) -> Iterator[Run]:
    """A run cut into some that fit a bucket; gradients of large parameters are padded to whole blocks."""
    grad, size = grad.float(), ELEMENTS_AT_ONCE[weights.device.type]
    for begin in range(0, len(weights), size):
        run, blocks = slice(begin, begin + size), slice(begin // BLOCK, (begin + size) // BLOCK)
        part = grad[run]
        if large:
            part = F.pad(part, (0, -len(part) % BLOCK))
        views = {
            key: tensor[blocks if key.endswith("_largest") else run] for key, tensor in state.items() if key != "step"
        }
        yield Run(weights[run], part, views)


def _buckets(pieces: Iterable[Run]) -> Iterator[list[Run]]:
    """Pieces in their order, as many as fit."""
    bucket: list[Run] = []
    elements = 0
    for piece in pieces:
        if bucket and elements + len(piece.grad) > ELEMENTS_AT_ONCE[piece.grad.device.type]:
            yield bucket
            bucket, elements = [], 0
        bucket.append(piece)
        elements += len(piece.grad)
    if bucket:
        yield bucket
