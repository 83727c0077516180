"""How generation divides its work: rows at once, tokens of a pass over prompts, the room of a cache. No torch.

The engine and the caches work by these, and the memory plan counts by them.
"""

from __future__ import annotations

ROWS_AT_ONCE = 16
"""Completions that ``generate`` computes together."""

TOKENS_IN_A_PASS = 2048
"""Of prompts that are read together; a longer prompt is read in several passes."""

FIRST_ROOM_TOKENS = 256


def grown_room(needed: int, doubled: int, capacity: int) -> int:
    """Tokens that a cache makes room for which has too little for ``needed``.

    ``doubled`` is twice what it goes by, its room or its tokens; ``capacity`` the most that will be needed.
    """
    return max(needed, min(capacity, max(doubled, FIRST_ROOM_TOKENS)))
