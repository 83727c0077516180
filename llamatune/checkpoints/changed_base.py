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
    """``base`` with ``changes``, which make ``config`` of its configuration.

    ``dtype_of_changed`` is what the changed tensors are rounded to; None: the base's.
    """

    def __init__(
        self,
        base: Checkpoint,
        config: LlamaConfig,
        changes: Mapping[str, BaseChange],
        dtype_of_changed: torch.dtype | None = None,
    ) -> None:
        super().__init__(base.path, config, base.parts)
        self.format, self.base = base.format, base
        self._changes, self._dtype = changes, dtype_of_changed

    def stored(self, name: str) -> Weight:
        return self.base.stored(name) if self._is_bases(name) else self.tensor(name)

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        return self.base.row_reader(name) if self._is_bases(name) else self.tensor(name).__getitem__

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        if self._is_bases(name):
            return self.base.tensor(name, mapped)
        source, dtype = self._source(name), self.dtype(name)
        change = self._changes.get(name, BaseChange())
        if change.value is not None:  # of another vocabulary than the base's, maybe
            return change.applied(change.value, dtype)
        if source is None:
            return change.applied(torch.zeros(self.shapes[name]), dtype)
        return change.applied(self.base.tensor(source), dtype)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        if self._is_bases(name):
            return self.base.rows(name, rows)
        return self.tensor(name)[list(rows)]

    def dtype(self, name: str) -> torch.dtype:
        if self._dtype is not None and name in self._changes:
            return self._dtype
        return self.base.dtype(self._source(name) or f"{name.removesuffix('.bias')}.weight")

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        if self.config == self.base.config:
            self.base.write_copy(staging, weight_of, dtype, on_event)
            return
        write = write_changed_copy if self.format == "hf" else write_meta
        write(staging, self.config, weight_of, lambda name: dtype or self.dtype(name), self.path, on_event)

    def _is_bases(self, name: str) -> bool:
        """Whether the tensor is the base's."""
        return name not in self._changes and name in self.base.shapes

    def _source(self, name: str) -> str | None:
        """The tensor of the base that a tensor comes from: of a head that was tied, the embedding; None: it is new."""
        if name in self.base.shapes:
            return name
        return EMBEDDING if name == HEAD else None


def changed_base(
    base: Checkpoint, changes: Mapping[str, BaseChange], tied: bool, dtype: torch.dtype | None = None
) -> Checkpoint:
    """The base as it is with an adapter's changes; itself where there are none."""
    if not changes:
        return base
    config, resolved = changed_config(base.config, changes, tied, base.path)
    return ChangedBase(base, config, resolved, dtype)
