"""Memory that was freed is given back to the system, whatever lies between it, or used again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from llamatune import host_memory
from llamatune.host_memory import give_back, held_host_bytes, reuse_freed_too

MIB = 1 << 20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_between_what_is_held_is_given_back() -> None:
    size = MIB // 16  # below what glibc maps for itself
    pieces = [bytearray(os.urandom(16) * (size // 16)) for _ in range(64 * 16)]
    held = pieces[::16]
    pieces.clear()
    before = held_host_bytes()["resident"]
    give_back()
    assert before - held_host_bytes()["resident"] > 32 * MIB
    assert sys.getsizeof(held[0]) > size


BLOCKS = """
import ctypes, resource, sys
from llamatune.host_memory import freed_at_once, reuse_freed_too
library = ctypes.CDLL(None)
library.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault
library.malloc.restype = ctypes.c_void_p
def use(count, size):
    blocks = [ctypes.c_void_p(library.malloc(ctypes.c_size_t(size))) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        library.free(block)
def print_faults(count=4, size=1 << 20):
    use(1, size)
    use(count, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        use(count, size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "left":
    reuse_freed_too(8 << 20)
    print_faults()
else:
    try:
        with freed_at_once(4 << 20):
            print_faults()
            raise ValueError
    except ValueError:
        print_faults()
    for asked in (1 << 20, 8 << 20):
        reuse_freed_too(asked)
        print_faults(1, 8 << 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_blocks_are_given_back_at_once_and_then_used_again_without_new_pages() -> None:
    set_by_others = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(set_by_others)}
    faults = {}
    user_limit = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    for way, more in (("left", {}), ("reused", {}), ("set by the user", user_limit)):
        words = [sys.executable, "-c", BLOCKS, "left" if way == "left" else "reused"]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment | more)
        faults[way] = [int(count) for count in done.stdout.split()]
    pages = 4 * MIB // os.sysconf("SC_PAGE_SIZE")
    assert faults["left"][0] > 10 * pages, "the system's limits show nothing"
    assert faults["reused"][0] > 10 * pages  # within the block
    assert faults["reused"][1] < pages  # after it, though it ended by an error
    assert faults["reused"][2] > 10 * pages, "a lower limit changes nothing"
    assert faults["reused"][3] < pages
    assert min(faults["set by the user"]) > 10 * pages


@pytest.mark.parametrize(("limit", "asked", "raised"), [(4, 8, True), (0, 8, False), (8, 4, False), (4, 40, False)])
def test_a_limit_is_raised_for_blocks_that_can_be_used_again(
    limit: int, asked: int, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(host_memory, "_reused_bytes", limit * MIB)
    monkeypatch.setattr(host_memory, "reuse_freed", found.append)
    reuse_freed_too(asked * MIB)
    assert bool(found) == raised
    assert all(size > asked * MIB for size in found)
