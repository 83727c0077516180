"""Compares one thread with several, to find the model size from which more pay: ``python benchmarks/threads.py``.

Runs training steps, evaluated batches and decoded tokens of models of increasing size, on one thread and on torch's
default number, alternating. Each line has the multiply-adds of the average product (by which ``llamatune.threads``
decides), the median milliseconds of both, their ratio, and the ratio of processor time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from material import make_base
from step_meter import even_batch
from steps import llamatune_step

from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.inference.evaluate import score_batch
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.threads import mean_product

SIZES = (64, 128, 256, 512, 1024)
ROWS = (1, 4, 16)
ROW_TOKENS = 32
NEW_TOKENS = 16
LEAST_SECONDS = 0.05
"""The least time of one measurement; shorter work is repeated."""


def works(base: Path, config: LlamaConfig, rows: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, tokens of a pass, and one repetition of each kind of work."""
    ids = torch.randint(3, config.vocab_size, (rows, ROW_TOKENS), generator=torch.Generator().manual_seed(3))
    batch = even_batch(rows, ROW_TOKENS, 0.5, ids)
    spec = {
        "model": {"path": str(base), "dtype": "float32"},
        "lora": {"r": 8, "target_modules": "all-linear"},
        "data": {"train": "none"},
        "training": {"output_dir": "none", "device": "cpu", "precision": "fp32", "max_steps": 1, "learning_rate": 1e-3},
    }
    step, _ = llamatune_step(spec, [batch])
    yield "training", batch.tokens, lambda: step(0)
    model = load_model(open_checkpoint(base), torch.float32, torch.device("cpu")).eval()
    yield "evaluation", batch.tokens, lambda: score_batch(model, batch)
    prompts = [row[:2].tolist() for row in ids]
    yield "decoding", rows, lambda: complete(model, prompts, Sampling(NEW_TOKENS, temperature=0), ())


def timed(work: Callable[[], object], threads: int, repetitions: int) -> tuple[float, float]:
    """Wall and processor seconds of one repetition."""
    torch.set_num_threads(threads)
    work()  # warm-up: threads start
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repetitions):
        work()
    return (time.perf_counter() - wall) / repetitions, (time.process_time() - processor) / repetitions


def main() -> None:
    """Measure every size and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="HIDDEN")
    parser.add_argument("--vocabulary", type=int, default=1024)
    options = parser.parse_args()
    many = torch.get_num_threads()
    out = sys.stdout.write
    out(f"| work | hidden | tokens | mean product | 1 thread, ms | {many} threads, ms | faster | processor time |\n")
    out("|---|---|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as scratch:
        for hidden in options.sizes:
            config = LlamaConfig(hidden, hidden * 11 // 4, 4, max(2, hidden // 64), max(2, hidden // 64),
                                 options.vocabulary)  # fmt: skip
            base = make_base(Path(scratch) / str(hidden), config, torch.float32)
            for rows in ROWS:
                for name, tokens, work in works(base, config, rows):
                    repetitions = max(1, round(LEAST_SECONDS / timed(work, 1, 1)[0]))
                    rounds = [[timed(work, n, repetitions) for n in (1, many)] for _ in range(options.rounds)]
                    (one, one_cpu), (more, more_cpu) = (
                        [statistics.median(column) for column in zip(*side, strict=True)]
                        for side in zip(*rounds, strict=True)
                    )
                    out(
                        f"| {name} | {hidden} | {tokens} | {mean_product(config, tokens):.2g} | {1e3 * one:.2f} "
                        f"| {1e3 * more:.2f} | {one / more:.2f} | {more_cpu / one_cpu:.2f} |\n"
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
