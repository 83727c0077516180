"""AdamW with its state in 8 bits (Dettmers et al. 2022): 2.03 bytes a parameter in the place of 8."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.blockwise import BLOCK, BlockwiseCode

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep their state in fp32, as everywhere in the field: there is nothing to win."""
_ELEMENTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 17}
"""Bounds the fp32 copies of the state: 64 MiB each on a GPU, what a core's cache holds on a CPU."""


@dataclass(frozen=True)
class _Piece:
    """A run of elements of one parameter, flat, with its slice of the state (views)."""

    weights: Tensor
    grad: Tensor
    state: dict[str, Tensor]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose two moments live in 8 bits in blocks of 256 elements.

    Each update decodes the moments, makes the update from the fp32 values and encodes those, on as many parameters at
    once as fit in a bucket: few kernels, however many matrices LoRA has.

    State: ``step`` (fp32, on the CPU), ``exp_avg`` and ``exp_avg_sq`` (uint8, filled up to whole blocks) with
    ``exp_avg_largest`` and ``exp_avg_sq_largest`` (fp32, one for each block); of a small tensor the moments in fp32.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._codes: dict[torch.device, tuple[BlockwiseCode, BlockwiseCode]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and forget nothing of the others."""
        assert closure is None, "no closure: the loss is not computed again"
        for group in self.param_groups:
            alike: dict[tuple[torch.device, bool, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_fresh_state(parameter))
                state["step"] += 1
                large = parameter.numel() >= SMALLEST_QUANTIZED
                alike.setdefault((parameter.device, large, int(state["step"])), []).append(parameter)
            for (device, large, step), parameters in alike.items():
                pieces = (piece for p in parameters for piece in _pieces(p, self.state[p], large))
                for bucket in _buckets(pieces):
                    self._update(bucket, group, step, device, large)

    def _update(
        self, bucket: list[_Piece], group: dict[str, Any], step: int, device: torch.device, large: bool
    ) -> None:
        """Equation 12 of AdamW on everything in the bucket, laid end to end."""
        beta1, beta2 = group["betas"]
        grad = torch.cat([piece.grad for piece in bucket])
        first, second = (self._joined(bucket, name, device, large) for name in ("exp_avg", "exp_avg_sq"))
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # Made from the fp32 moments, so rounding enters through what is remembered alone.
        root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        change = torch.div(first, root, out=root).mul_(-group["lr"] / (1 - beta1**step))
        weights = [piece.weights for piece in bucket]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        parts = torch.split(change, [len(piece.grad) for piece in bucket])
        torch._foreach_add_(weights, [part[: len(w)] for part, w in zip(parts, weights, strict=True)])
        self._store(bucket, "exp_avg", first, device, large)
        self._store(bucket, "exp_avg_sq", second, device, large)

    def _code(self, name: str, device: torch.device) -> BlockwiseCode:
        if device not in self._codes:
            self._codes[device] = BlockwiseCode(True, device), BlockwiseCode(False, device)
        return self._codes[device][0 if name == "exp_avg" else 1]

    def _joined(self, bucket: list[_Piece], name: str, device: torch.device, large: bool) -> Tensor:
        """One moment of the whole bucket, fp32."""
        held = torch.cat([piece.state[name] for piece in bucket])
        if not large:
            return held
        return self._code(name, device).decode(held, torch.cat([piece.state[f"{name}_largest"] for piece in bucket]))

    def _store(self, bucket: list[_Piece], name: str, moment: Tensor, device: torch.device, large: bool) -> None:
        tensors = {name: moment}
        if large:
            tensors[name], tensors[f"{name}_largest"] = self._code(name, device).encode(moment)
        for key, tensor in tensors.items():
            into = [piece.state[key] for piece in bucket]
            torch._foreach_copy_(into, list(torch.split(tensor, [len(part) for part in into])))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back in its own dtypes: torch would make floats of the parameter's dtype of the codes."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
                    for key, tensor in state_dict["state"][number].items()
                }


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Both moments zero, since the blocks' largest magnitudes are."""
    step = torch.zeros((), dtype=torch.float32, device="cpu")
    count, device = parameter.numel(), parameter.device
    if count < SMALLEST_QUANTIZED:
        return {"step": step} | {
            name: torch.zeros(count, dtype=torch.float32, device=device) for name in ("exp_avg", "exp_avg_sq")
        }
    blocks = -(-count // BLOCK)
    state = {"step": step}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=device)
        state[f"{name}_largest"] = torch.zeros(blocks, dtype=torch.float32, device=device)
    return state


def _pieces(parameter: nn.Parameter, state: dict[str, Tensor], large: bool) -> Iterator[_Piece]:
    """The parameter cut into runs that a bucket can hold; gradients of large ones are filled up to whole blocks."""
    assert parameter.grad is not None
    assert parameter.is_contiguous()
    weights, grad = parameter.view(-1), parameter.grad.reshape(-1).float()
    size = _ELEMENTS_AT_ONCE[parameter.device.type]
    for begin in range(0, len(weights), size):
        run, blocks = slice(begin, begin + size), slice(begin // BLOCK, (begin + size) // BLOCK)
        part = grad[run]
        if large:
            part = F.pad(part, (0, -len(part) % BLOCK))
        views = {
            key: tensor[blocks if key.endswith("_largest") else run] for key, tensor in state.items() if key != "step"
        }
        yield _Piece(weights[run], part, views)


def _buckets(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in their order, as many as fit."""
    bucket: list[_Piece] = []
    held = 0
    for piece in pieces:
        if bucket and held + len(piece.grad) > _ELEMENTS_AT_ONCE[piece.grad.device.type]:
            yield bucket
            bucket, held = [], 0
        bucket.append(piece)
        held += len(piece.grad)
    if bucket:
        yield bucket
