"""A completion: the new token ids of a prompt, and why they ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """New ids without the EOS; ``finish_reason`` is ``eos``, ``length``, or ``stop``: ``is_enough`` said so."""

    ids: list[int]
    finish_reason: str
