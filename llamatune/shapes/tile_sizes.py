"""How much is computed at once: tile sizes and portions that bound the memory in flight. No torch.

The model computes by them and the memory plan counts by them. Portions differ by device: ``cuda`` or ``cpu``.
"""

from __future__ import annotations

TILE_TOKENS = 2048
"""Rows that a fused block has in flight where nothing of them is kept."""

SHORT_TOKENS = 256
"""Longest sample for which plain matrix products compute attention in bf16 on a CPU: they are quicker than its flash
kernel, about twice at 120 tokens."""

LOGITS_AT_ONCE = {"cuda": 1 << 25, "cpu": 1 << 22}
"""Logits in flight. In fp32 128 MiB, 1,024 rows of LLaMA-2's vocabulary; on a CPU 16 MiB, which stay near its cache."""

WEIGHTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 19}
"""NF4 weights that are unpacked in one piece: what stays in a core's cache, and on a GPU 64 MiB of indices."""

ELEMENTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 17}
"""Elements of 8-bit optimizer state that are updated in one piece."""
