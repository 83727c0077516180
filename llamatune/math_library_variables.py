"""Environment variables of oneDNN and MKL: how much they keep between matrix products on a CPU. No torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from llamatune.processor import has_amx

_KEPT_PRODUCTS = 64
"""Sizes of 16-bit products whose compiled code oneDNN keeps, in place of 1,024.

One takes some 0.6 MiB, whatever the model, half of it in the library through which torch calls oneDNN (ideep), which
keeps its own description of 1,024. Without AMX code is compiled again in 0.5 ms. With AMX that takes 3 to 30 ms, and
all of it is kept.
"""

_VARIABLES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(_KEPT_PRODUCTS),
    "LRU_CACHE_CAPACITY": "1",  # ideep's, without which products take no longer
    "MKL_DISABLE_FAST_MM": "1",  # or MKL keeps the buffers of fp32 products, some MiB of each thread
}


def prepare_math_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """Without AMX, set what the user has not set, for this process and those that it starts.

    The libraries read it before their first product. ``docs/memory.md`` has what it saves.
    """
    if not has_amx():
        for name, text in _VARIABLES.items():
            environment.setdefault(name, text)
