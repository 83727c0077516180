"""CPU threads of torch: their number, one for small products, their end; the cores of a process, and of one thread."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from llamatune.openmp_variables import THREAD_COUNTS
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig

BREAK_EVEN = 1 << 25
"""Multiply-adds of the average product from which on threads are left to torch.

At half of it a second thread on two idle cores gains a sixth in training and a half in evaluation, at a tenth next to
nothing. On busy cores it costs many times the time. ``benchmarks/threads.py`` measures it; ``docs/performance.md`` has
the figures.
"""

_LEAST_TOKENS = 128
"""Fewer tokens count as this many: most of the time goes into reading the weights, which two threads do faster."""

_AT_START = torch.get_num_threads()


def mean_product(config: LlamaConfig, tokens: float) -> float:
    """Multiply-adds of the average matrix product in a forward pass; fewer ``tokens`` count as ``_LEAST_TOKENS``."""
    block = sum(rows * columns for rows, columns in map(config.linear_shape, LINEAR_MODULES))
    weights = config.num_hidden_layers * block + config.vocab_size * config.hidden_size
    return max(tokens, _LEAST_TOKENS) * weights / (config.num_hidden_layers * len(LINEAR_MODULES) + 1)


def threads_for(config: LlamaConfig, tokens: float) -> int:
    """Threads for passes of ``tokens`` tokens: one below ``BREAK_EVEN``, else torch's own number.

    A number set by the environment or by ``torch.set_num_threads`` is kept. Otherwise the result depends on the model
    and the tokens alone: another number of threads rounds sums in another way, and a resumed run must give the same
    bits, however busy the machine is.
    """
    current = torch.get_num_threads()
    is_chosen = current != _AT_START or any(os.environ.get(name) for name in THREAD_COUNTS)
    return 1 if mean_product(config, tokens) < BREAK_EVEN and not is_chosen else current


@contextlib.contextmanager
def suitable_threads(config: LlamaConfig, tokens: float) -> Iterator[None]:
    """Use ``threads_for`` threads within the block, and the number from before after it."""
    with using_threads(threads_for(config, tokens)):
        yield


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Use so many threads within the block, as ``suitable_threads`` does."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current_core() -> int | None:
    """The processor core that the calling thread runs on; None where the system does not tell."""
    try:
        text = Path("/proc/thread-self/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[36])
    except (OSError, ValueError, IndexError):
        return None


def release_threads() -> None:
    """End the threads that help the calling one in products; the next product starts new ones.

    For threads that take turns. libgomp, the OpenMP of torch's wheels, keeps helpers for each. Where there are more
    threads than cores, they sleep between any two operations, and a step takes half as long again. Nothing happens with
    another OpenMP.
    """
    for pause in _openmp_pauses():
        pause(_SOFT)


_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0, section 3.2.43: resources are given up, settings are kept."""


@functools.cache
def _openmp_pauses() -> list[Callable[[int], int]]:
    """``omp_pause_resource_all`` of each libgomp in this process: packages bring their own beside torch's."""
    found: list[Callable[[int], int]] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for path in {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}:
            with contextlib.suppress(OSError, AttributeError):
                found.append(ctypes.CDLL(path).omp_pause_resource_all)
    return found


def usable_cores() -> list[int]:
    """The processor cores that this process may use, the one that it runs on first; none where the system tells none.

    So two processes that begin at the same time do not begin with the same core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores, current = sorted(os.sched_getaffinity(0)), current_core()
    first = cores.index(current) if current in cores else 0
    return [*cores[first:], *cores[:first]]


def stay_on(cores: Collection[int]) -> None:
    """Set the affinity of the calling thread, and of those that it starts, to ``cores``.

    Nothing happens without a core, or with none that the thread may use. Threads that take turns are faster on one
    core: on several, each turn wakes another, whose caches are cold. ``docs/sweep.md`` has the figures.
    """
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
