"""The processor: its model name, AVX-512, VNNI and AMX, and how many of its cores this process may use. No torch."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The processor's model, from ``/proc/cpuinfo`` on Linux; its architecture where that names none."""
    return next(filter(None, _values("model name")), "") or platform.processor() or platform.machine() or "unknown"


@functools.cache
def has_avx512() -> bool:
    """Whether it has AVX-512 with 8-bit and 16-bit integers, for which oneDNN has products in bf16."""
    return _has("avx512bw")


@functools.cache
def has_amx() -> bool:
    """Whether it multiplies tiles of bf16, of 16 rows each (AMX of Intel's Xeons since 2023)."""
    return _has("amx_bf16")


@functools.cache
def has_vnni() -> bool:
    """Whether it adds products of 8-bit integers to 32-bit ones in one instruction, of 512 bits (AVX-512 VNNI)."""
    return _has("avx512_vnni")


def gains_by_onednn_layout() -> bool:
    """Whether generation is faster on it with large int8 matrices in oneDNN's layout. With AMX it was not measured."""
    return has_vnni() and not has_amx()


def casts_by_onednn() -> bool:
    """Whether oneDNN casts int8 for long prompts on it. With AMX torch does: the other was not measured there."""
    return has_avx512() and not has_amx()


def _has(feature: str) -> bool:
    return any(feature in flags.split() for flags in _values("flags"))


def _values(name: str) -> Iterator[str]:
    """What ``/proc/cpuinfo`` says of each core; nothing on other systems."""
    try:
        lines = _INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return iter(())
    return (line.partition(":")[2].strip() for line in lines if line.startswith(name))


def core_count() -> int:
    """Logical cores that this process may use, by its main thread; all of the machine if the system does not tell."""
    return len(os.sched_getaffinity(os.getpid())) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
