"""How many threads compute: work whose products are small runs on one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from llamatune.shapes.config import LINEAR_MODULES, LlamaConfig

BREAK_EVEN = 1 << 25
"""Multiply-adds of the average product from which on threads are left to torch.

Half of it gained a sixth in training and two fifths in evaluation from a second idle core, and the demo's training
nothing; on busy cores threads cost many times the time. ``benchmarks/threads.py`` measures, ``docs/performance.md`` has
the figures.
"""

_LEAST_TOKENS = 128
"""Fewer count as so many: most of the time goes into reading the weights, and two threads read them faster."""

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Where a user says how many threads torch is to start with."""

_AT_START = torch.get_num_threads()


def mean_product(config: LlamaConfig, tokens: float) -> float:
    """Multiply-adds of the average matrix product in a forward pass of so many tokens, at least ``_LEAST_TOKENS``."""
    block = sum(rows * columns for rows, columns in map(config.linear_shape, LINEAR_MODULES))
    weights = config.num_hidden_layers * block + config.vocab_size * config.hidden_size
    return max(tokens, _LEAST_TOKENS) * weights / (config.num_hidden_layers * len(LINEAR_MODULES) + 1)


def threads_for(config: LlamaConfig, tokens: float) -> int:
    """How many threads passes of so many tokens are computed on: one below ``BREAK_EVEN``, else torch's own number.

    A number that the environment or a caller of ``torch.set_num_threads`` has chosen stays as it is. Beside these, the
    answer depends on the model and the tokens alone: sums on another number of threads round in another way, and a
    resumed run must end in the same bits, however busy the machine is.
    """
    current = torch.get_num_threads()
    is_chosen = current != _AT_START or any(os.environ.get(name) for name in _VARIABLES)
    return 1 if mean_product(config, tokens) < BREAK_EVEN and not is_chosen else current


@contextlib.contextmanager
def suitable_threads(config: LlamaConfig, tokens: float) -> Iterator[None]:
    """Compute on ``threads_for`` many threads within, and on as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(config, tokens))
    try:
        yield
    finally:
        torch.set_num_threads(before)
