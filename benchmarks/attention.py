"""Times attention by kernel at 20 lengths, the first call of each and a later one: forward and backward, and decoding.

``python benchmarks/attention.py [--device cuda] [--shape 7b]``. cuDNN plans anew for each length, FlashAttention does
not; ``llamatune`` turns cuDNN off. A kernel that does not run is named with its reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench import timed
from material import SHAPES
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamatune.model.attention import Documents, attend
from llamatune.shapes.llama_config import LlamaConfig

LENGTHS = (61, 77, 93, 101, 115, 131, 163, 187, 203, 229, 251, 283, 307, 349, 401, 457, 509, 601, 769, 1021)
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RAGGED = "llamatune, eight samples in a row"
Times = dict[str, list[float]]
"""Milliseconds of each length's ``first`` and ``later`` call."""


def kernels_on(device: str) -> tuple[str, ...]:
    """A CPU has FlashAttention alone."""
    return tuple(KERNELS) if device == "cuda" else ("flash",)


def calls(config: LlamaConfig, kernel: str, kind: str, device: str) -> Iterator[Callable[[], Any]]:
    """For each length what is timed; ``kind``: ``forward``, ``forward and backward`` or ``decoding``."""
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if kernel != "flash":
        K = H  # only FlashAttention takes fewer heads of k and v everywhere
    trains = kind == "forward and backward"

    def drawn(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, E, device=device, dtype=torch.bfloat16, requires_grad=trains)

    for tokens in LENGTHS:
        q = drawn(H, 1 if kind == "decoding" else tokens)
        k, v = drawn(K, tokens), drawn(K, tokens)
        documents = None
        if kernel == RAGGED:
            lengths = [max(1, tokens * share // 36) for share in range(1, 8)]
            documents = Documents((*lengths, tokens - sum(lengths)), q.device)

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, documents: Documents | None = documents) -> Any:
            if documents is not None:
                o = attend(q, k, v, None, documents)
            else:
                with sdpa_kernel(KERNELS[kernel]):
                    causal = kind != "decoding"
                    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != K)
            return torch.autograd.grad(o.sum(), (q, k, v)) if trains else o

        yield call


def measure(config: LlamaConfig, kernel: str, kind: str, device: str) -> Times:
    """First and later calls; kernels are loaded before, with a length that is not measured.

    Raises:
        RuntimeError: the kernel does not run here.
    """
    first: list[float] = []
    later: list[float] = []
    cuda = device == "cuda"
    for number, call in enumerate((next(calls(config, kernel, kind, device)), *calls(config, kernel, kind, device))):
        times = [1e3 * timed(call, cuda)[0] for _ in range(6)]
        if number > 1:  # the first length was called while kernels were loaded
            first.append(times[0])
            later.append(statistics.median(times[1:]))
    return {"first": first, "later": later}


KINDS = ("forward", "forward and backward", "decoding")


def main() -> None:
    """Print a line for each kernel and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    options = parser.parse_args()
    for kind in KINDS:
        for kernel in (*kernels_on(options.device), *([] if kind == "decoding" else [RAGGED])):
            try:
                found = measure(SHAPES[options.shape], kernel, kind, options.device)
            except RuntimeError as fault:
                sys.stdout.write(f"{kind:20} {kernel:34} {str(fault).splitlines()[0]}\n")
                continue
            first, later = (statistics.median(found[name]) for name in ("first", "later"))
            sys.stdout.write(f"{kind:20} {kernel:34} first {first:8.2f} ms, later {later:8.2f} ms\n")


if __name__ == "__main__":
    main()
