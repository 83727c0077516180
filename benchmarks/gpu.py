"""Comparisons of docs/performance.md that need a GPU, in pieces that go on where they were cut off.

``python benchmarks/gpu.py --output DIR --pieces dense,nf4 [--minutes 9]``; ``--list`` names the pieces with estimated
minutes on an H100. A finished measurement is a line of ``DIR/PIECE/measured.jsonl`` and is not made again.
``DIR/PIECE.tar`` holds all of a piece. LLaMA-2-7B's shape with random weights, drawn on the device once a process.
``--device cpu --shape tiny`` tries every piece without a GPU; its figures mean nothing. Needs transformers, peft and
accelerate, and 80 GB.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import against_peft
import attention
import compiling
import decoding
import launches
import memory
from against_peft import DENSE, dense_rows
from bench import SETTINGS, Bench
from gpu_steps import liger_step_s, trace_steps
from material import SHAPES
from pieces import OutOfTime, PieceBench, pack, run_piece
from tables import Table

from llamatune.demo.run_demo import MATERIAL
from llamatune.spec_sections import ModelSection

Measurement = Callable[[PieceBench, Table], None]


class Piece(NamedTuple):
    """Measurements by name, and how long all take on an H100: an estimate until they have run on one."""

    minutes: float
    measurements: dict[str, Measurement]


def rounds(rows: int, tokens: int, specs: dict[str, dict[str, Any]], name: str, targets: str = "qv") -> Measurement:
    """Steps of llamatune with several changes to its spec, in paired rounds: the first against each other one."""

    def measure(bench: PieceBench, table: Table) -> None:
        shape, (first, *others) = bench.options.shape, specs
        for other in others:
            ours = {key: bench.spec(shape, targets, micro_batch=rows, **specs[key]) for key in (first, other)}
            report = bench.steps(ours, None, shape, rows, bench.tokens(tokens), alone=True)
            speeds = [rows * bench.tokens(tokens) / report["step_s"][key] for key in ours]
            apart = max(abs(a - b) for a, b in zip(*report["losses"].values(), strict=True))
            table.row(f"tokens/s, {name}: {first}, {other}", *speeds, report["ratios"], apart)
            for key, peaks in report["alone"].items():
                for kind in ("memory", "reserved"):
                    table.row(f"peak {kind}, GiB, {name}: {key}", peaks[f"peak_{kind}_bytes"] / 2**30, None, [], None)

    return measure


def attention_kernel(kernel: str, kind: str) -> Measurement:
    """First and later calls at 20 lengths; what does not run is noted."""

    def measure(bench: PieceBench, table: Table) -> None:
        options, config = bench.options, SHAPES[bench.options.shape]
        if kernel not in (*attention.kernels_on(options.device), attention.RAGGED):
            return
        work = partial(attention.measure, config, kernel, kind, options.device)
        found = bench.once("attention", [options.shape, kernel, kind], 30.0, work)
        first, later = (statistics.median(found[name]) for name in ("first", "later"))
        ratios = [a / b for a, b in zip(found["first"], found["later"], strict=True)]
        table.row(f"attention {kind}, ms, {kernel}: first call of a length, later", first, later, ratios, None)

    return measure


def against(targets: str, peer: str, shape: str | None = None, rows: int = 8, tokens: int = 512) -> Measurement:
    """Dense steps beside transformers + PEFT, and the peaks of each side alone."""

    def measure(bench: PieceBench, table: Table) -> None:
        of = bench.options.shape if shape is None else shape_of_8b(bench)
        name = f"{rows} x {tokens} {targets}, {peer}" + (", 8B" if shape else "")
        dense_rows(bench, table, name, SETTINGS[peer], of, targets, rows, bench.tokens(tokens), alone=True)

    return measure


def shape_of_8b(bench: Bench) -> str:
    """LLaMA-3-8B's shape, cut as the other is."""
    return {"7b": "8b", "7b-2-layers": "8b-2-layers"}.get(bench.options.shape, bench.options.shape)


def with_liger(bench: PieceBench, table: Table) -> None:
    """transformers + PEFT with Liger-Kernel's kernels, if that is installed: its own best."""
    if importlib.util.find_spec("liger_kernel") is None:
        table.note("liger-kernel: not installed")
        return
    work = partial(liger_step_s, bench, 8, bench.tokens(512))
    step_s = bench.once("liger", [bench.options.shape, bench.options.dense_rounds], 60.0, work)
    speed = 8 * bench.tokens(512) / step_s
    table.row("tokens/s, 8 x 512 q,v: transformers + PEFT with Liger-Kernel", speed, None, [], None)


def traced(rows: int) -> Measurement:
    """Profiler traces of two windows, for a trace viewer."""

    def measure(bench: PieceBench, table: Table) -> None:
        name = f"trace-{rows}x512.json.gz"
        work = partial(trace_steps, bench, rows, bench.tokens(512), bench.directory / name)
        bench.once("trace", [bench.options.shape, rows], 45.0, work)
        table.note(f"two windows of {rows} x 512 q,v: {name}")

    return measure


def counted(case: str) -> Measurement:
    """A line of the table of ``launches.py``, in ``launches.md``."""

    def measure(bench: PieceBench, table: Table) -> None:
        work = partial(launches.count_case, bench, case, bench.tokens(512))
        counts = bench.once("launches", [bench.options.shape, case], 45.0, work)
        path = bench.directory / "launches.md"
        before = path.read_text() if path.exists() else launches.heading() + "\n"
        line = launches.line_of(case, counts)
        table.progress(line)
        if line not in before:
            path.write_text(f"{before}{line}\n")

    return measure


def _epochs(bench: PieceBench, table: Table) -> None:
    against_peft.end_to_end(bench, table)


_KERNELS = {"Triton": {"kernels": "auto"}, "plain": {"kernels": "plain"}, "compiled": {"compile": True}}
_DTYPES = [dtype for dtype in get_args(ModelSection.model_fields["dtype"].annotation) if dtype in ("nf4", "float8")]
_PACKED = {dtype: {"dtype": dtype} for dtype in _DTYPES}
_COMPILED = {f"{name}, compiled": {**values, "compile": True} for name, values in _PACKED.items()}
_FIRST_BF16 = {"bf16": {}}
_PEERS = ("Trainer, batch 8", "Trainer, batch 8, 16-bit adapters")

PIECES = {
    "attention": Piece(3.0, {f"{kind}, {kernel}": attention_kernel(kernel, kind)
        for kind in attention.KINDS for kernel in (*attention.KERNELS, attention.RAGGED)
        if not (kind == "decoding" and kernel == attention.RAGGED)}),
    "dense": Piece(4.0, {f"{targets}, {peer}": against(targets, peer)
        for targets in (targets for targets, _, _ in DENSE.values()) for peer in _PEERS}),
    "kernels": Piece(5.0, {
        "8 x 512": rounds(8, 512, _KERNELS, "8 x 512 q,v"), "all seven": rounds(8, 512, _KERNELS, "8 x 512 all", "all"),
        "1 x 512": rounds(1, 512, _KERNELS, "1 x 512 q,v"), "Liger-Kernel": with_liger}),
    "nf4": Piece(5.0, {
        "1 x 4096": rounds(1, 4096, {**_FIRST_BF16, **_PACKED}, "1 x 4096 q,v"),
        "8 x 512": rounds(8, 512, {**_FIRST_BF16, **_PACKED}, "8 x 512 q,v"),
        "1 x 512": rounds(1, 512, {**_FIRST_BF16, **_PACKED}, "1 x 512 q,v"),
        "1 x 4096, compiled": rounds(1, 4096, {"bf16, compiled": {"compile": True}, **_COMPILED}, "1 x 4096 q,v")}),
    "epochs": Piece(6.0, {"epochs": _epochs}),
    "memory": Piece(6.0, {row.name: partial(memory.on_device_row, row=row) for row in memory.ROWS}),
    "compile": Piece(8.0, {"q,v": partial(compiling.measure, targets="qv", dtype="bfloat16"),
        "all seven": partial(compiling.measure, targets="all", dtype="bfloat16"),
        "NF4": partial(compiling.measure, targets="qv", dtype="nf4")}),
    "trace": Piece(3.0, {f"{rows} x 512": traced(rows) for rows in (1, 8)}),
    "launches": Piece(6.0, {case: counted(case) for case in launches.CASES}),
    "decode": Piece(3.0, {f"{rows} rows": partial(decoding.measure, rows=rows) for rows in (1, 4, 16)}),
    "8b": Piece(3.0, {peer: against("all", peer, "8b", 2, 4096) for peer in _PEERS[1:]}),
}  # fmt: skip


def listing() -> str:
    """Pieces, their estimated minutes and measurements."""
    lines = (f"{name:10} {piece.minutes:4.0f} min  {'; '.join(piece.measurements)}" for name, piece in PIECES.items())
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the measurements of the chosen pieces that are not there yet."""
    parser = against_peft.build_parser(required=False)
    parser.description = __doc__
    parser.add_argument("--pieces", default=",".join(PIECES), help="of " + ",".join(PIECES))
    parser.add_argument("--list", action="store_true", help="print the pieces and end")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing that would take longer")
    best = "Trainer, batch 8;Trainer, batch 8, 16-bit adapters;Trainer, batch 8 by length, 16-bit adapters"
    parser.set_defaults(device="cuda", shape="7b", epochs=5, rounds=1, settings=best, dense_rounds=10, limit=200,
                        rows=MATERIAL / "instructions.jsonl", tokenizer=MATERIAL / "base" / "tokenizer.model",
                        output=Path("gpu-results"))  # fmt: skip
    until, options = time.monotonic(), parser.parse_args()
    if options.list:
        sys.stdout.write(listing())
        return
    until += 60 * options.minutes
    os.environ["HF_HUB_OFFLINE"] = "1"
    unknown = set(options.pieces.split(",")) - PIECES.keys()
    if unknown:
        parser.error(f"no piece is called {', '.join(sorted(unknown))}")
    failed = [name for name in options.pieces.split(",") if not run(options, name, until)]
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}")


def run(options: Any, name: str, until: float) -> bool:
    """One piece; whether all of it is there."""
    directory = options.output.resolve() / name
    with tempfile.TemporaryDirectory() as scratch:
        bench = PieceBench(options, directory, Path(scratch), until)
        table = Table(directory, " ".join(sys.argv))
        try:
            failed = run_piece(bench, table, PIECES[name].measurements)
        except OutOfTime:
            table.note("the minutes are over: the same command goes on with what is left")
            pack(directory)
            return False
    return not failed


if __name__ == "__main__":
    main()
