"""Compares how OpenMP's threads wait for each other, alone and beside busy processes: ``python benchmarks/waiting.py``.

Each way of waiting is measured in a process of its own, since OpenMP reads its variables once; the ways alternate. Each
line has the median milliseconds of a training step, an evaluated batch and decoded tokens over the rounds. ``--busy 2``
starts two processes that each keep a core busy, and ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from material import make_base
from threads import works

from llamatune.openmp_variables import SPINS
from llamatune.shapes.llama_config import LlamaConfig

WAYS = {
    "OpenMP's own": {},
    f"{SPINS:,} turns": {"GOMP_SPINCOUNT": str(SPINS)},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LEAST_REPETITIONS = 3


def measure(base: Path, hidden: int, rows: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each repetition of each kind of work, in this process."""
    found = {}
    for name, _, work in works(base, configuration(hidden), rows):
        work()  # threads start
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < _LEAST_REPETITIONS:
            begun = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begun))
        found[name] = times
    return found


def configuration(hidden: int) -> LlamaConfig:
    """Of the measured model."""
    return LlamaConfig(hidden, hidden * 11 // 4, 4, max(2, hidden // 64), max(2, hidden // 64), 1024)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    """Measure every way and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="Of 32 tokens.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="Of each measurement.")
    parser.add_argument("--busy", type=int, default=0, help="Processes that keep a core busy.")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.base is not None:
        sys.stdout.write(json.dumps(measure(options.base, options.hidden, options.rows, options.seconds)))
        return
    clean = {name: text for name, text in os.environ.items() if name not in _VARIABLES}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch, busy_processes(options.busy):
        base = make_base(Path(scratch) / "base", configuration(options.hidden), torch.float32)
        for _ in range(options.rounds):
            for way, variables in WAYS.items():
                command = [sys.executable, *sys.argv, "--base", str(base)]
                done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=True)
                for kind, measured in json.loads(done.stdout).items():
                    times[way, kind] += measured
    kinds = list(dict.fromkeys(kind for _, kind in times))
    sys.stdout.write(f"| hidden {options.hidden}, {options.rows} rows | {' | '.join(kinds)} |\n|---|---|---|---|\n")
    for way in WAYS:
        medians = " | ".join(f"{statistics.median(times[way, kind]):.1f}" for kind in kinds)
        sys.stdout.write(f"| {way} | {medians} |\n")


if __name__ == "__main__":
    main()
