"""The memory bandwidth of a device, as torch reaches it, and the bytes that a step of decoding reads."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llamatune.devices import free_memory_bytes
from llamatune.model.transformer import Transformer
from llamatune.shapes.llama_config import LlamaConfig

_BUFFER_BYTES = 1 << 29
"""Read in one go: more than most caches hold. Two such buffers are allocated, if there is room."""
_TRIES = 3
_ROW = 4096


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s of the fastest way to read or to copy a large tensor, on torch's present number of threads.

    Several ways are tried, because on a CPU some are limited by their arithmetic. A copy counts what it reads and what
    it writes.
    """
    size = min(_BUFFER_BYTES, free_memory_bytes(device) // 4) // (4 * _ROW) * (4 * _ROW)
    source = torch.ones(size // 4, device=device)
    target, matrix, vector = torch.empty_like(source), source.view(-1, _ROW), torch.ones(_ROW, device=device)
    ways: list[tuple[int, Callable[[], object]]] = [
        (size, source.view(torch.int64).amax),
        (size, lambda: matrix @ vector),
        (2 * size, lambda: target.copy_(source)),
    ]
    return max(moved / min(_seconds(act, device) for _ in range(_TRIES)) for moved, act in ways)


def clock(device: torch.device) -> float:
    """Seconds, once all that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    act()
    return clock(device) - started


def tensors_of(model: Transformer) -> list[Tensor]:
    """All that holds the weights, packed or not; tensors that layers share are named once."""
    return [*{id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()]


def weight_bytes(model: Transformer) -> int:
    """Bytes of the weights as they are held, packed ones as such."""
    return sum(tensor.nbytes for tensor in tensors_of(model))


def step_weight_bytes(model: Transformer, rows: int) -> int:
    """Bytes of weights that a step reads, each once: all, but of an embedding that is not the head's ``rows`` rows."""
    embedding = model.model.embed_tokens.weight
    unread = 0 if model.lm_head is None else max(0, len(embedding) - rows) * embedding[0].nbytes
    return weight_bytes(model) - unread


def tokens_looked_at(config: LlamaConfig, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens whose keys and values a row's step reads: the mean over the steps after the first new token."""
    seen = itertools.islice(itertools.count(prompt_tokens + 1), new_tokens - 1)
    most = config.sliding_window or prompt_tokens + new_tokens
    return sum(min(tokens, most) for tokens in seen) / (new_tokens - 1)
