"""Seeds derived from the run's seed and a purpose, so that a resumed run needs no generator state."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed below 2^63 for one purpose, as in ``derived_seed(0, "dropout", window)``; other purposes give others."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
