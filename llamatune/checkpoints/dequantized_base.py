"""A base as training saw it that held it quantised: its blocks' matrices quantised and unpacked again, in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.checkpoints.weights import Weight, WeightOf
from llamatune.events import OnEvent, ignore_event, never_stop
from llamatune.formats.manifest import Staging


class DequantizedBase(Checkpoint):
    """``base`` with the blocks' matrices as ``kind`` keeps them; everything is in bf16, as beside them in training."""

    def __init__(self, base: Checkpoint, kind: str) -> None:
        super().__init__(base.path, base.config, base.parts)
        self.format, self.base = base.format, base
        self._quantized = QuantizedBase(kind, base, base.config, torch.device("cpu"), ignore_event, never_stop)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        packed = self._quantized(name)
        if packed is None:
            return self.base.tensor(name).to(torch.bfloat16)
        return packed.unpacked(torch.bfloat16).clone()

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        return self.tensor(name)[list(rows)]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def stored(self, name: str) -> Weight:
        return self.tensor(name)

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        return self.tensor(name).__getitem__

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        self.base.write_copy(staging, weight_of, dtype, on_event)
