"""Free memory of the host for this process (MemAvailable, control groups, ulimit -v); what glibc's malloc keeps.

Freed blocks are given back to the system or used again. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

_LEAST_REUSED, _MOST_REUSED = 4 << 20, 16 << 20
_GIVEN_BACK_AT_ONCE = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""
_reused_bytes = 0
"""The bytes up to which freed blocks are used again, as set here; 0: glibc's own way."""
_LIMITS = ("mmap_threshold", "trim_threshold", "top_pad", "mmap_max")
"""What users may set of glibc's allocator, as the variables and tunables are called."""


def free_host_bytes(root: Path = Path("/")) -> int:
    """The machine's available memory, or less where a control group (container, Slurm job) or ``ulimit -v`` says so."""
    kibibytes = _entry(root / "proc/meminfo", "MemAvailable:")
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kibibytes is None else kibibytes * 1024
    return max(0, min([available, *_group_bytes(root), *_address_bytes()]))


def held_host_bytes() -> dict[str, int]:
    """Bytes that this process has ``resident`` and ``mapped``; empty where there is no /proc."""
    try:
        mapped, resident = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[:2])
    except OSError:
        return {}
    return {"resident": resident * resource.getpagesize(), "mapped": mapped * resource.getpagesize()}


def give_back() -> None:
    """Give whole pages that were freed back to the system, by glibc's ``malloc_trim``, in some 0.3 ms.

    Nothing happens with another C library. Tensors of up to 32 MiB lie on a heap that what lives longer keeps large.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def reuse_freed(most_bytes: int) -> None:
    """Let glibc use freed blocks of up to ``most_bytes`` again, and give larger ones back, by ``mallopt``.

    ``most_bytes`` counts as 4 MiB where it is less, and as 16 where it is more. From twice that on the end of the heap
    is given back. A block that is made and freed in every layer would otherwise come from the system each time, as new
    pages. glibc raises the limits by itself with each larger block that is freed, up to 32 MiB, of a small model, too.
    These hold for the whole process. Nothing happens with another C library, or where environment variables set them.
    """
    _set_limit(min(max(most_bytes, _LEAST_REUSED), _MOST_REUSED))


def reuse_freed_too(bytes_of_block: int) -> None:
    """Let glibc use freed blocks of this size again, too, if it is below 16 MiB and ``reuse_freed`` set a lower limit.

    The limit stays for what is smaller later. While another thread loads a model its blocks are kept up to it, too.
    """
    beyond = bytes_of_block + resource.getpagesize()  # its header, and where it is aligned
    if 0 < _reused_bytes < beyond <= _MOST_REUSED:
        reuse_freed(beyond)


@contextlib.contextmanager
def freed_at_once(reused_after: int) -> Iterator[None]:
    """Let glibc give blocks of 1 MiB and more back as they are freed; afterwards ``reuse_freed(reused_after)``.

    While a model is loaded each is of another size. Freed on the heap, they leave holes, of 180 MiB beside 0.5 billion
    weights in int8, and what is made later is sometimes in other holes each time: what is resident grows step by step.
    """
    _set_limit(_GIVEN_BACK_AT_ONCE)
    try:
        yield
    finally:
        reuse_freed(reused_after)


def _set_limit(reused: int) -> None:
    """Of the bytes of a block that is used again; the user's limits stay."""
    global _reused_bytes
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables for name in _LIMITS):
        return
    try:
        set_limit = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    _reused_bytes = reused
    set_limit(_M_MMAP_THRESHOLD, reused)
    set_limit(_M_TRIM_THRESHOLD, 2 * reused)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim


def _address_bytes() -> Iterator[int]:
    allowed, held = resource.getrlimit(resource.RLIMIT_AS)[0], held_host_bytes()
    if allowed != resource.RLIM_INFINITY and held:
        yield allowed - held["mapped"]


def _group_bytes(root: Path) -> Iterator[int]:
    """What is left under the limit of each control group of this process, and of their parents.

    Inactive file pages count as used there, but the kernel frees them on demand: they are added.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2 has one tree for everything
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            top, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        for directory in (root / top / part for part in (group, *group.parents)):
            allowed, taken = _number(directory / limit), _number(directory / used)
            if allowed is not None and taken is not None:
                yield allowed - taken + (_entry(directory / "memory.stat", cache) or 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _entry(path: Path, name: str) -> int | None:
    """The number behind ``name`` in a file of one entry a line."""
    entries = (line.split() for line in _lines(path))
    return next((int(entry[1]) for entry in entries if entry[:1] == [name]), None)


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
