"""Memory that was freed is given back to the system, whatever lies between it."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from llamatune.free_memory import give_back, held_host_bytes

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
