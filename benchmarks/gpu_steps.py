"""Single steps for ``gpu.py``: traced by torch.profiler, and of transformers + PEFT with Liger-Kernel."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch
from bench import SETTINGS, Bench, timed
from material import SHAPES
from steps import Step, makers
from torch.profiler import ProfilerActivity, profile


def step_of(bench: Bench, rows: int, tokens: int, peer: str | None = None) -> Step:
    """llamatune's step for q,v, or a peer's."""
    shape = bench.options.shape
    settings = {"ours": {}, "theirs": None, "rows": rows, "row_tokens": tokens, "target_share": 0.46,
                "vocab_size": SHAPES[shape].vocab_size}  # fmt: skip
    if peer is None:
        settings["ours"] = {"llamatune": bench.spec(shape, "qv", micro_batch=rows)}
    else:
        settings["theirs"] = bench.peer(shape, "qv", SETTINGS[peer])
    (make,) = makers(settings).values()
    return make()[0]


def trace_steps(bench: Bench, rows: int, tokens: int, path: Path) -> list[str]:
    """Write a Chrome trace of two windows after two others; the kernels that take most time, one a line."""
    cuda, step = bench.options.device == "cuda", step_of(bench, rows, tokens)
    for window in range(2):
        timed(partial(step, window), cuda)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for window in range(2):
            timed(partial(step, 2 + window), cuda)
    profiler.export_chrome_trace(str(path))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    lines = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90).splitlines()
    path.with_name(f"{path.name.partition('.')[0]}.txt").write_text("\n".join(lines) + "\n")
    return lines[:12]


def liger_step_s(bench: Bench, rows: int, tokens: int) -> float:
    """Median seconds of a step of transformers + PEFT with Liger-Kernel's norm, rotation, SwiGLU and loss.

    It replaces functions of transformers, so nothing of transformers may be measured in this process after it.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    cuda = bench.options.device == "cuda"
    step = step_of(bench, rows, tokens, "Trainer, batch 8, 16-bit adapters")
    times = [timed(partial(step, window), cuda)[0] for window in range(3 + bench.options.dense_rounds)]
    torch.cuda.empty_cache()
    return statistics.median(times[3:])
