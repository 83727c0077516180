"""A base with the tensors that an adapter replaces or adds, read as any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llamatune.checkpoints.base_changes import BaseChange, changed_config
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.config_json import EMBEDDING, HEAD
from llamatune.checkpoints.huggingface_weights import write_changed_copy
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.checkpoints.weights import Weight, WeightOf
from llamatune.events import OnEvent
from llamatune.formats.manifest import Staging
from llamatune.shapes.llama_config import LlamaConfig


class ChangedBase(Checkpoint):
    """``base`` with ``changes``, which make ``config`` of its configuration. A changed tensor has the base's dtype."""

    def __init__(self, base: Checkpoint, config: LlamaConfig, changes: Mapping[str, BaseChange]) -> None:
        super().__init__(base.path, config, base.parts)
        self.format, self.base, self._changes = base.format, base, changes

    def is_made(self, name: str) -> bool:
        return name in self._changes or self._source(name) is None

    def stored(self, name: str) -> Weight:
        return self.base.stored(self._source(name) or name)

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        source, change = self._source(name), self._changes.get(name)
        zeros = torch.zeros(self.shapes[name] if source is None else 0)  # of a bias that the base has not
        read = zeros.__getitem__ if source is None else self.base.row_reader(source)
        return read if change is None else lambda rows: change.applied(read, rows)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        if not self.is_made(name):
            return self.base.tensor(self._source(name) or name, mapped)
        made, read = torch.empty(self.shapes[name], dtype=self.dtype(name)), self.row_reader(name)
        for rows in self.row_portions(name):
            made[rows] = read(rows)
        return made

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        if not self.is_made(name):
            return self.base.rows(self._source(name) or name, rows)
        return self.tensor(name)[list(rows)]

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._source(name) or f"{name.removesuffix('.bias')}.weight")

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        if self.config == self.base.config:
            self.base.write_copy(staging, weight_of, dtype, on_event)
            return
        write = write_changed_copy if self.format == "hf" else write_meta
        write(staging, self.config, weight_of, lambda name: dtype or self.dtype(name), self.path, on_event)

    def _source(self, name: str) -> str | None:
        """The tensor of the base that a tensor comes from: of a head that was tied, the embedding; None: it is new."""
        if name in self.base.shapes:
            return name
        return EMBEDDING if name == HEAD else None


def changed_base(base: Checkpoint, changes: Mapping[str, BaseChange], tied: bool) -> Checkpoint:
    """The base as it is with an adapter's changes; itself where there are none. ``tied`` as in ``changed_config``."""
    if not changes:
        return base
    config, resolved = changed_config(base.config, changes, tied, base.path)
    return ChangedBase(base, config, resolved)
