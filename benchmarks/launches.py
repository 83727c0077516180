"""Where the time of a training step goes: kernels, products, elementwise bytes a layer, host and device time.

``python benchmarks/launches.py [--device cuda] [--shape 7b] [--case NAME]``. On a GPU torch.profiler gives launches and
times; on a CPU there are operations alone. Bytes are what operations read and write, products and attention left out;
a Triton kernel and a compiled function count their tensors once. A layer is the difference of three layers and one.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench import SETTINGS, Bench, add_options, timed
from material import SHAPES
from steps import Step, empty_device, makers
from tables import shown
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatune.model import compiled_functions
from llamatune.model.kernels import choice

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "linear", "matmul")
_ATTENTION = re.compile(r"attention|attn|fmha|flash")
_PRODUCT_KERNEL = re.compile(r"gemm|nvjet|xmma|cublas|splitK|gemv|cutlass(?!.*fmha)", re.IGNORECASE)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
PEER = "transformers + PEFT"
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {  # targets, rows of 512 tokens, changes to the spec
    "8 x 512 q,v, plain": ("qv", 8, {"kernels": "plain"}),
    "8 x 512 q,v": ("qv", 8, {}),
    "8 x 512 q,v, compiled": ("qv", 8, {"compile": True}),
    f"8 x 512 q,v, {PEER}": ("qv", 8, {}),
    "8 x 512 all seven": ("all", 8, {}),
    f"8 x 512 all seven, {PEER}": ("all", 8, {}),
    "1 x 512 q,v, plain": ("qv", 1, {"kernels": "plain"}),
    "1 x 512 q,v": ("qv", 1, {}),
    "1 x 512 q,v, NF4": ("qv", 1, {"dtype": "nf4"}),
}


class Operations(TorchDispatchMode):
    """Counts operations that compute something, products among them, and the bytes that the others read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.products = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "detach", "_local_scalar", "record_", "set_")):
            self.operations += 1
            if name in _PRODUCTS:
                self.products += 1
            elif not _ATTENTION.search(name):
                self.add(args, kwargs, result)
        return result

    def add(self, *used: Any) -> None:
        """Count each tensor that is used once."""
        tensors = {id(leaf): leaf for leaf in tree_leaves(used) if isinstance(leaf, Tensor)}
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @contextlib.contextmanager
    def with_kernels(self) -> Iterator[None]:
        """Count Triton kernels and compiled functions, too: the dispatcher does not see into them."""

        def counted(make: Callable[..., Any], *which: Any) -> Callable[..., Any]:
            function = make(*which)

            def run(*args: Any) -> Any:
                with torch.utils._python_dispatch._disable_current_modes():
                    result = function(*args)
                self.operations += 1
                self.add(args, result)
                return result

            return run

        with self, contextlib.ExitStack() as stack:
            for module, name in ((choice, "_kernel"), (compiled_functions, "_compiled")):
                stack.enter_context(mock.patch.object(module, name, partial(counted, getattr(module, name))))
            yield


def settings_of(bench: Bench, case: str, shape: str, tokens: int) -> dict[str, Any]:
    """What ``steps.makers`` wants for one side."""
    targets, rows, changes = CASES[case]
    common = {"rows": rows, "row_tokens": tokens, "target_share": 0.46, "vocab_size": SHAPES[shape].vocab_size}
    if case.endswith(PEER):
        theirs = bench.peer(shape, targets, SETTINGS["Trainer, batch 8"])
        return {"ours": {}, "theirs": theirs, **common}
    return {"ours": {case: bench.spec(shape, targets, micro_batch=rows, **changes)}, "theirs": None, **common}


def profiled(step: Step, cuda: bool) -> dict[str, float]:
    """Launches, those of products, seconds of the device and of the host in a later step; none of them on a CPU."""
    if not cuda:
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        timed(partial(step, 3), cuda)
    launches = products = 0
    device_s = host_s = 0.0
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            device_s += event.self_device_time_total / 1e6
            if not event.key.startswith(("Memcpy", "Memset")):
                launches += event.count
                is_product = _PRODUCT_KERNEL.search(event.key) and not _ATTENTION.search(event.key)
                products += event.count if is_product else 0
        elif event.device_type == DeviceType.CPU and event.key not in _WAITS:
            host_s += event.self_cpu_time_total / 1e6
    return {"launches": launches, "product launches": products, "device s": device_s, "host s": host_s}


def count_step(make: Callable[[], tuple[Step, int]], cuda: bool) -> dict[str, float]:
    """All counts of one step after two others."""
    empty_device()
    step, _ = make()
    for window in range(2):
        step(window)
    with (operations := Operations()).with_kernels():
        step(2)
    seconds = [timed(partial(step, 3 + window), cuda)[0] for window in range(3)]
    counts = {"operations": operations.operations, "products": operations.products, "bytes": operations.bytes}
    return {**counts, **profiled(step, cuda), "step s": min(seconds)}


def count_case(bench: Bench, case: str, tokens: int = 512) -> dict[str, float]:
    """Counts of a whole step, and ``a layer`` of each but the times."""
    shape, cuda = bench.options.shape, bench.options.device == "cuda"
    counts = []
    depths = (1, min(3, SHAPES[shape].num_hidden_layers), SHAPES[shape].num_hidden_layers)
    for layers in depths:
        cut = f"{shape}, {layers} layers"
        SHAPES[cut] = SHAPES[shape].with_layers(layers)
        (make,) = makers(settings_of(bench, case, cut, tokens)).values()
        counts.append(count_step(make, cuda))
    one, more, whole = counts
    names = [name for name in one if not name.endswith(" s")]
    layer = {f"{name} a layer": (more[name] - one[name]) / (depths[1] - depths[0]) for name in names}
    return {**whole, **layer}


HEADS = ("launches", "product launches", "operations", "products", "launches a layer", "operations a layer",
         "bytes a layer", "host s", "device s", "step s")  # fmt: skip


def line_of(case: str, counts: dict[str, float]) -> str:
    """A line of the Markdown table."""
    return f"| {case} | {' | '.join(shown(counts.get(name)) for name in HEADS)} |"


def heading() -> str:
    """The first two lines of the table."""
    return f"| step | {' | '.join(HEADS)} |\n|{'---|' * (len(HEADS) + 1)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, output_required=False)  # the table goes to stdout
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    options.shape = options.shape or ("7b" if options.device == "cuda" else "tiny")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        bench.drawn = True
        sys.stdout.write(heading() + "\n")
        for case in options.case or CASES:
            sys.stdout.write(line_of(case, count_case(bench, case, options.tokens)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
