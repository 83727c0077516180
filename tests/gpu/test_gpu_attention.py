"""Attention by each kernel on a row of several samples against each sample alone in fp64, forward and backward."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import attention as attention_times
import pytest
import torch
from gpu_tools import relative_error
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamatune.devices import capability_of
from llamatune.model import attention
from llamatune.model.attention import Documents, attend
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.shapes.attention_kernels import Kernel, choose_kernel
from llamatune.shapes.llama_config import LlamaConfig

pytestmark = pytest.mark.gpu

LENGTHS = {"one": (37,), "ragged": (1, 29, 5, 64, 130, 2), "equal": (33, 33, 33)}
HEADS = {"alike": (4, 4), "grouped": (6, 2), "one for all": (8, 1)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 64, 100, 128, 12, 250, 256)
BACKENDS = {
    Kernel.SDPA: SDPBackend.FLASH_ATTENTION,
    Kernel.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}


def tolerance(dtype: torch.dtype) -> float:
    """q, k, v, softmax, o and their gradients are rounded, and each sum has up to 130 terms in fp32.

    The memory-efficient kernel makes each product in fp32 of three in TF32, which keep 20 bits.
    """
    return 8 * max(torch.finfo(dtype).eps, 2.0**-20) + 130**0.5 * 8 * torch.finfo(torch.float32).eps


def drawn(heads: tuple[int, int], tokens: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, on the CPU."""
    generator = torch.Generator().manual_seed(tokens + size)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(1, count, tokens, size, generator=generator).to(dtype) for count in counts]


def alone(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients from each sample on its own, by the definition, in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    groups, outputs = q.shape[1] // k.shape[1], []
    for one, two, three in zip(*(torch.split(x, list(lengths), 2) for x in leaves), strict=True):
        two, three = (x.repeat_interleave(groups, 1) for x in (two, three))
        scores = one @ two.transpose(2, 3) / q.shape[3] ** 0.5
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(3) @ three)
    o = torch.cat(outputs, 2)
    return [o, *torch.autograd.grad(o, leaves, grad.double())]


def check(
    device: torch.device, heads: tuple[int, int], lengths: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    """Output and gradients of ``attend`` against ``alone``."""
    q, k, v, grad = drawn(heads, sum(lengths), size, dtype)
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    o = attend(*leaves, None, Documents(lengths, device))
    assert o.dtype == dtype
    found = [o, *torch.autograd.grad(o, leaves, grad.to(device))]
    for name, ours, theirs in zip(("o", "q", "k", "v"), found, alone(q, k, v, grad, lengths), strict=True):
        assert relative_error(ours, theirs) <= tolerance(dtype), name


@contextlib.contextmanager
def torch_runs(kernel: Kernel, device: torch.device) -> Iterator[None]:
    """On a GPU torch fails where it would take another kernel than this one."""
    restricted = device.type == "cuda" and kernel in BACKENDS
    with sdpa_kernel(BACKENDS[kernel]) if restricted else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_of_the_rule(device: torch.device, heads: str, rows: str, dtype: torch.dtype, size: int) -> None:
    lengths = LENGTHS[rows]
    kernel = choose_kernel(capability_of(device), DTYPE_NAMES[dtype], size, sum(lengths), len(lengths))
    with torch_runs(kernel, device):
        check(device, HEADS[heads], lengths, size, dtype)


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", LENGTHS)
def test_the_memory_efficient_kernel_of_older_gpus(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: str, dtype: torch.dtype, size: int
) -> None:
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: Kernel.EFFICIENT)
    with torch_runs(Kernel.EFFICIENT, device):
        check(device, HEADS["grouped"], LENGTHS[rows], size, dtype)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_and_a_single_query(device: torch.device, heads: str, dtype: torch.dtype) -> None:
    q, k, v, _ = drawn(HEADS[heads], 21, 64, dtype)
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    mask[:, :4] = torch.eye(21, dtype=torch.bool)[:, :4]
    groups = q.shape[1] // k.shape[1]
    wide = (q.double(), *(x.double().repeat_interleave(groups, 1) for x in (k, v)))
    on_device = [x.to(device) for x in (q, k, v)]
    found = attend(*on_device, mask[None, None].to(device), None)
    assert relative_error(found, F.scaled_dot_product_attention(*wide, attn_mask=mask)) <= tolerance(dtype)
    last = attend(on_device[0][:, :, -1:], *on_device[1:], None, None)
    wanted = F.scaled_dot_product_attention(wide[0][:, :, -1:], *wide[1:])
    assert relative_error(last, wanted) <= tolerance(dtype)


def test_times_of_new_lengths(gpu: torch.device, tell: Callable[[str], None]) -> None:
    """Reported, not judged: the first call of each of 20 lengths and later ones, cuDNN beside FlashAttention."""
    config = LlamaConfig(2048, 64, 1, 16, 16, 32)
    for kernel in ("cuDNN", "flash", attention_times.RAGGED):
        try:
            times = attention_times.measure(config, kernel, "forward and backward", "cuda")
        except RuntimeError as fault:
            tell(f"{kernel}: {str(fault).splitlines()[0]}")
            continue
        first, later = (statistics.median(times[name]) for name in ("first", "later"))
        tell(f"{kernel}: first call of a length {first:.2f} ms, later {later:.2f} ms")
