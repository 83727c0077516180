"""Times eager and compiled steps (``training.compile``), alternating, on Alpaca rows of different lengths.

``python benchmarks/compiling.py --rows alpaca.json --tokenizer TOKENIZER --output DIR`` prints, for each setting, the
compile time (first step minus a later one, with an empty and with a filled cache), the ratio of later steps, and after
how many steps the compile time is earned back.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import Bench, add_options, difference
from material import make_prepared
from tables import Table


def measure(bench: Bench, table: Table, targets: str, dtype: str) -> None:
    """Measure one setting, with an empty and with a filled cache."""
    options, shape = bench.options, bench.options.shape
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.new_path("compiler-cache"))
    prepared = make_prepared(bench.new_path("prepared"), options.rows, options.tokenizer, options.limit)
    ours = {name: bench.spec(shape, targets, dtype=dtype, compile=name == "compiled") for name in ("compiled", "eager")}
    more = {"prepared": str(prepared), "warm_up": 1, "own_process": True}  # which starts with nothing compiled

    def both() -> list[dict[str, Any]]:
        return [
            bench.steps(ours, None, shape, 8, 0, **more),
            bench.steps(ours, None, shape, 8, 0, **more, rounds=2),
        ]

    first, again = bench.once("compile", [shape, targets, dtype, ours], 150.0, both)
    steps, ratio = first["step_s"], statistics.median(first["ratios"])
    name = f"{shape}, {targets}, {dtype}"
    apart = difference(*first["losses"].values())
    table.row(f"step, s: compiled, eager; {name}", steps["compiled"], steps["eager"], first["ratios"], apart)
    for kind, report in (("empty", first), ("filled", again)):
        seconds = report["first_step_s"]["compiled"] - steps["compiled"]
        gained = steps["eager"] * (1 - 1 / ratio)
        pays = f"after {seconds / gained:.0f} steps" if gained > 0 else "never"
        table.note(f"{name}: compiling takes {seconds:.1f} s with {kind} cache and is earned back {pays}")


def all_settings(bench: Bench, table: Table) -> None:
    """Measure the settings of docs/performance.md."""
    dtypes = {"bf16": "bfloat16", "fp32": "float32"}
    for targets in ("qv", "all"):
        measure(bench, table, targets, dtypes[bench.options.dtype])
    measure(bench, table, "qv", "nf4")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Alpaca rows, JSON")
    add_options(parser)
    parser.set_defaults(dense_rounds=40, limit=None)
    options = parser.parse_args()
    options.shape = options.shape or ("7b" if options.device == "cuda" else "50m")
    table = Table(options.output, " ".join(sys.argv))
    with tempfile.TemporaryDirectory() as scratch:
        all_settings(Bench(options, Path(scratch)), table)


if __name__ == "__main__":
    main()
