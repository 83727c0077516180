"""Estimates for many ranks: what a rank holds, bytes and collectives of a step, and the share of a step that computes.

    python benchmarks/scale.py [--prepared DIR] [--tflops 400] [--micro-batches 8]

Bytes follow from the shapes, balance from dealing the rows of a prepared directory (or of 512 tokens each). Speeds are
given, not measured: ``--tflops`` of a GPU in matrix products, ``--network`` in GB/s, ``--latency-us`` of a message.
Prints Markdown; ``docs/scale.md`` explains it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llamatune.formats.prepared import read_lengths
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.gradient_lanes import count_lanes, deal_passes, own_lanes
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.presets import PRESETS

MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
ADAPTERS = {"q, v": ("q_proj", "v_proj"), "all linear": LINEAR_MODULES}
WEIGHT_BYTES = {"bf16": 2.0, "nf4": 0.516}
RANKS = (8, 64, 1024)
_RANK = 16


def block_parameters(config: LlamaConfig) -> int:
    """Parameters of the seven matrices of one block."""
    return sum(math.prod(config.linear_shape(name)) for name in LINEAR_MODULES)


def adapter_bytes(config: LlamaConfig, modules: Sequence[str]) -> int:
    """Of an adapter's gradients, or weights, in fp32."""
    return 4 * count_parameters(config, AdapterSpec(_RANK, 32.0, 0.0, tuple(modules))).trainable_parameters


def held_bytes(config: LlamaConfig, dtype: str, placement: str, ranks: int) -> float:
    """Of the base on one rank: embedding and head in 16 bits, and the blocks where ``placement`` puts them."""
    blocks = config.num_hidden_layers * block_parameters(config) * WEIGHT_BYTES[dtype]
    ends = 2 * (count_parameters(config).base_parameters - config.num_hidden_layers * block_parameters(config))
    rooms = 2 * blocks / config.num_hidden_layers
    return ends + {"device": blocks, "host": rooms, "shard": blocks / ranks + rooms}[placement]


def gathered_bytes(config: LlamaConfig, dtype: str) -> float:
    """Received by a rank of many for one pass: each block before its forward and before its backward pass.

    The two last blocks of the forward pass are in the rooms when the backward pass begins, the first two when it ends.
    """
    return 2 * (config.num_hidden_layers - 2) * block_parameters(config) * WEIGHT_BYTES[dtype]


def seconds_per_token(config: LlamaConfig, tflops: float) -> float:
    """Of LoRA on a frozen base: a forward pass and the gradient of the input, 2 operations a parameter each."""
    return 4 * count_parameters(config).base_parameters / (tflops * 1e12)


def balance(windows: Sequence[Sequence[int]], ranks: int) -> float:
    """The mean share of the slowest rank's time in which a rank computes; ``windows`` are tokens of passes."""
    shares = []
    for tokens in windows:
        dealt = deal_passes(tokens, count_lanes(ranks))
        loads = [
            sum(tokens[i] for lane in own_lanes(rank, ranks, len(dealt)) for i in dealt[lane]) for rank in range(ranks)
        ]
        shares.append(sum(loads) / (ranks * max(loads)))
    return math.fsum(shares) / len(shares)


def windows_of(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    """The rows in their order, ``size`` a window, repeated until there are eight windows."""
    rows = itertools.cycle(lengths)
    return [list(itertools.islice(rows, size)) for _ in range(8)]


def tables(options: argparse.Namespace, lengths: Sequence[int]) -> Iterator[str]:
    """The lines of the four tables; ``lengths`` are tokens of rows."""
    yield "What a rank holds of the base, GB\n"
    yield row("model", "weights", "device", "host", *(f"shard, {ranks} ranks" for ranks in (2, 4, 8)))
    yield row(*["---"] * 7)
    for name, dtype in itertools.product(MODELS, WEIGHT_BYTES):
        config = PRESETS[name]
        sizes = [held_bytes(config, dtype, placement, 1) for placement in ("device", "host")]
        sizes += [held_bytes(config, dtype, "shard", ranks) for ranks in (2, 4, 8)]
        yield row(name, dtype, *(f"{size / 1e9:.1f}" for size in sizes))
    yield "\nReceived by a rank, MB; two collectives a step for gradients, 2 (blocks - 2) a pass for `shard`\n"
    yield row(
        "model",
        *(f"gradients a step, {adapter}" for adapter in ADAPTERS),
        *(f"gathers a pass, {d}" for d in WEIGHT_BYTES),
    )
    yield row(*["---"] * 5)
    for name in MODELS:
        config = PRESETS[name]
        gradients = (f"{2 * adapter_bytes(config, modules) / 1e6:,.0f}" for modules in ADAPTERS.values())
        yield row(name, *gradients, *(f"{gathered_bytes(config, dtype) / 1e6:,.0f}" for dtype in WEIGHT_BYTES))
    yield f"\nTokens of a pass behind which copies hide, at {options.tflops:g} TFLOP/s\n"
    yield row("model", *(f"{dtype} at {speed:g} GB/s" for dtype in WEIGHT_BYTES for speed in options.network))
    yield row(*["---"] * (1 + len(WEIGHT_BYTES) * len(options.network)))
    for name in MODELS:
        config = PRESETS[name]
        pace = seconds_per_token(config, options.tflops)
        hidden = (
            gathered_bytes(config, dtype) / (speed * 1e9) / pace for dtype in WEIGHT_BYTES for speed in options.network
        )
        yield row(name, *(f"{tokens:,.0f}" for tokens in hidden))
    yield f"\nThe share of a step in which a rank computes: {options.micro_batches} rows for each, all linear layers\n"
    yield row(
        "model", "ranks", "rows of an update", "balance", *(f"with messages at {s:g} GB/s" for s in options.network)
    )
    yield row(*["---"] * (4 + len(options.network)))
    for name, ranks in itertools.product(MODELS, RANKS):
        config, rows = PRESETS[name], options.micro_batches * ranks
        windows = windows_of(lengths, rows)
        even = balance(windows, ranks)
        busy = seconds_per_token(config, options.tflops) * sum(map(sum, windows)) / len(windows) / ranks
        latency = 2 * math.ceil(math.log2(ranks)) * options.latency_us * 1e-6
        sent = 2 * adapter_bytes(config, LINEAR_MODULES) * (ranks - 1) / ranks
        shares = (busy / (busy / even + latency + sent / (speed * 1e9)) for speed in options.network)
        yield row(name, f"{ranks:,}", f"{rows:,}", f"{even:.2f}", *(f"{share:.2f}" for share in shares))


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prepared", type=Path, help="a directory of prepare-data whose row lengths are dealt")
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--network", type=float, nargs="+", default=[300.0, 25.0], help="GB/s of a rank")
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--micro-batches", type=int, default=8, help="of one row, for each rank and update")
    options = parser.parse_args()
    lengths = [512] * 64 if options.prepared is None else read_lengths(options.prepared)[0]
    sys.stdout.write("\n".join(tables(options, lengths)) + "\n")


if __name__ == "__main__":
    main()
