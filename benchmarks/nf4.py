"""NF4 of a 4096 x 4096 matrix, compared with bitsandbytes and torchao: ``python benchmarks/nf4.py [--device cuda]``.

Prints the relative error of the round trip, bytes a weight, and the best and median time of quantising and of unpacking
to bf16, alternating in one process. Packages that are not installed are left out.

Why ``llamatune/model/nf4.py`` is our own code: on one CPU core (torch 2.13, bitsandbytes 0.50.2, torchao 0.18) errors
agree to three digits at the same bytes a weight (0.0921, 0.516), ours quantises in 107 ms where they take 504 and 1202,
unpacks in 8.4 ms where they take 13 and 145, and nothing has to be installed. This was not run on a GPU, where
bitsandbytes unpacks in one kernel and ours in three for each 2^24 weights.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench import timed
from torch import Tensor

from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import Scratch


class Entrant(NamedTuple):
    """One implementation: to NF4, back to bf16, and the bytes that the packed form needs."""

    quantize: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]
    held_bytes: Callable[[Any], int]


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def own() -> Entrant:
    """llamatune's."""
    scratch = Scratch()
    return Entrant(
        lambda W: NF4Weight.quantize(W, scratch),
        lambda packed: packed.unpacked(torch.bfloat16),
        lambda packed: sum(buffer.nbytes for buffer in packed.buffers()),
    )


def bitsandbytes() -> Entrant:
    """bitsandbytes with its double quantisation."""
    from bitsandbytes import functional

    def quantize(W: Tensor) -> Any:
        return functional.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")

    def held(packed: Any) -> int:
        codes, state = packed
        return size(codes, state.absmax, state.state2.absmax, state.offset)

    return Entrant(quantize, lambda packed: functional.dequantize_4bit(*packed), held)


def torchao() -> Entrant:
    """torchao's tensor subclass at torchtune's settings."""
    from torchao.quantization import to_nf4

    def held(packed: Any) -> int:
        return size(packed.quantized_data, packed.quantized_scalers, packed.quantization_factor, packed.scaler_mean)

    return Entrant(
        lambda W: to_nf4(W, block_size=64, scaler_block_size=256), lambda packed: packed.get_original_weight(), held
    )


def main() -> None:
    """Run the entrants, alternating, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    W = (torch.randn(options.size, options.size) * 0.02).to(device, torch.bfloat16)
    entrants: dict[str, Entrant] = {}
    for make in (own, bitsandbytes, torchao):
        with contextlib.suppress(ImportError):
            entrants[make.__name__] = make()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in entrants}
    facts: dict[str, tuple[float, float]] = {}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, entrant in entrants.items():
            quantizing, packed = timed(partial(entrant.quantize, W), device.type == "cuda")
            unpacking, unpacked = timed(partial(entrant.unpack, packed), device.type == "cuda")
            error = float((unpacked.float() - W.float()).norm() / W.float().norm())
            facts[name] = error, entrant.held_bytes(packed) / W.numel()
            if turn:
                times[name][0].append(1e3 * quantizing)
                times[name][1].append(1e3 * unpacking)
    sys.stdout.write(f"{options.size} x {options.size} bf16, {device}, {torch.get_num_threads()} threads; ms\n")
    sys.stdout.write(f"{'':14} {'error':>8} {'bytes':>7} {'quantise':>9} {'median':>8} {'unpack':>8} {'median':>8}\n")
    for name, (quantizing_ms, unpacking_ms) in times.items():
        columns = [statistic(ms) for ms in (quantizing_ms, unpacking_ms) for statistic in (min, statistics.median)]
        numbers = " ".join(f"{column:8.1f}" for column in columns)
        sys.stdout.write(f"{name:14} {facts[name][0]:8.5f} {facts[name][1]:7.4f}  {numbers}\n")


if __name__ == "__main__":
    main()
