"""All comparisons of docs/performance.md that need a GPU, in one table, on LLaMA-2-7B's shape with random weights.

``python benchmarks/gpu.py --rows alpaca.json --tokenizer tokenizer.model --output DIR [--parts dense,...]``. ``--device
cpu --shape tiny`` tries every part without a GPU; its figures mean nothing. Needs torch with CUDA, transformers,
peft and accelerate, 16 GB of disk for the base, and a GPU of 80 GB for the parts that hold two models.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import against_peft
import compiling
import memory
from bench import Bench
from tables import Table


def nf4(bench: Bench, table: Table) -> None:
    """Steps on an NF4 base and on a bf16 one, eager and compiled, 4,096 tokens a row."""
    shape = bench.options.shape
    for compiled in (False, True):
        ours = {
            name: bench.spec(shape, "qv", dtype=dtype, compile=compiled)
            for name, dtype in (("nf4", "nf4"), ("bfloat16", "bfloat16"))
        }
        report = bench.steps(ours, None, shape, 1, 4096)
        speeds = [4096 / report["step_s"][name] for name in ours]
        kind = "compiled" if compiled else "eager"
        table.row(f"dense, tokens/s, 1 x 4096, q,v, {kind}: NF4, bf16", *speeds, report["ratios"], None)


PARTS = {
    "dense": against_peft.dense,
    "epochs": against_peft.end_to_end,
    "memory": memory.on_device,
    "nf4": nf4,
    "compile": compiling.all_settings,
}


def main() -> None:
    """Run the chosen parts."""
    parser = against_peft.build_parser()
    parser.description = __doc__
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    best = "Trainer, batch 8;Trainer, batch 8, 16-bit adapters;Trainer, batch 8 by length, 16-bit adapters"
    parser.set_defaults(device="cuda", shape="7b", epochs=5, rounds=1, settings=best)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = Table(options.output, " ".join(sys.argv))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        for part in options.parts.split(","):
            PARTS[part](bench, table)


if __name__ == "__main__":
    main()
