"""Tokens per second, wait share and peak memory of each rank, for the summary of a run."""

from __future__ import annotations

from typing import Any

import torch

from llamatune.ranks import Ranks
from llamatune.training.run_memory import peak_memory_bytes
from llamatune.training.training_step import Update


class RankMeter:
    """Counts what this process computed since it started; earlier processes of a resumed run are not in it."""

    def __init__(self) -> None:
        self._tokens, self._waited_s, self._elapsed_s = 0, 0.0, 0.0

    def add(self, update: Update, elapsed_s: float) -> None:
        """Count one window, whether it made an update or not."""
        self._tokens += update.own_tokens
        self._waited_s += update.waited_s
        self._elapsed_s += elapsed_s

    def facts(self, ranks: Ranks, device: torch.device) -> dict[str, Any]:
        """Under ``ranks`` one object a rank; nothing of one process, whose summary says the same."""
        if ranks.size == 1:
            return {}
        elapsed_s = max(self._elapsed_s, 1e-9)
        own = {
            "peak_memory_bytes": peak_memory_bytes(device),
            "tokens_per_second": self._tokens / elapsed_s,
            "wait_share": round(self._waited_s / elapsed_s, 4),
        }
        return {"ranks": ranks.gather(own)}
