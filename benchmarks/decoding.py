"""Decoding with captured steps and with steps that are launched kernel by kernel: tokens/s of batches, alternating.

A piece of ``gpu.py``. Each batch is greedy, without an EOS, and captures its steps anew, which is part of its time. No
step is captured on a CPU, and both sides are the same there.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from drawn_base import drawn_base
from material import DTYPES, SHAPES
from pieces import PieceBench
from tables import Table

from llamatune.benchmarking.measure_generation import random_prompts, time_batch
from llamatune.inference import captured_steps
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.model.transformer import Transformer

_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 128, 256, 3


def measure(bench: PieceBench, table: Table, rows: int) -> None:
    """Batches of so many rows: with captured steps against without."""
    options = bench.options
    settings = [options.shape, options.dtype, rows, bench.tokens(_PROMPT_TOKENS), bench.tokens(_NEW_TOKENS), _ROUNDS]
    found = bench.once("decoding", settings, 60.0, partial(_speeds, bench, rows))
    speeds = {name: sorted(found[name])[len(found[name]) // 2] for name in ("captured", "launched")}
    ratios = [a / b for a, b in zip(found["captured"], found["launched"], strict=True)]
    name = f"decoding, tokens/s, {rows} x ({settings[3]} + {settings[4]}): captured, launched one by one"
    table.row(name, speeds["captured"], speeds["launched"], ratios, None)


def _speeds(bench: PieceBench, rows: int) -> dict[str, list[float]]:
    """Decoded tokens a second of each round, by name of the side; a first batch of each is not counted."""
    config, device = SHAPES[bench.options.shape], bench.device
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(drawn_base(config, DTYPES[bench.options.dtype][1], device), assign=True)
    model.eval().requires_grad_(False)
    prompts, new = random_prompts(config.vocab_size, rows, bench.tokens(_PROMPT_TOKENS)), bench.tokens(_NEW_TOKENS)
    found: dict[str, list[float]] = {"captured": [], "launched": []}
    with chosen_kernels("auto", device):
        for _ in range(1 + _ROUNDS):
            found["captured"].append(rows * (new - 1) / time_batch(model, prompts, new).decode)
            with mock.patch.object(captured_steps, "graphs_for", return_value=None):
                found["launched"].append(rows * (new - 1) / time_batch(model, prompts, new).decode)
    return {name: speeds[1:] for name, speeds in found.items()}
