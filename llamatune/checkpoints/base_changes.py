"""What an adapter changes in its base beside updates of the blocks' matrices: whole tensors, rows, head, embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamatune.checkpoints.adapter_header import EMBEDDING, HEAD, TOKENS, AdapterHeader
from llamatune.checkpoints.config_json import EMBEDDING as EMBEDDING_WEIGHT
from llamatune.checkpoints.config_json import HEAD as HEAD_WEIGHT
from llamatune.checkpoints.families import FAMILIES
from llamatune.errors import CheckpointError
from llamatune.model.adapters.apply import adapter_class
from llamatune.shapes.adapter import ADAPTER_KINDS
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig


@dataclass(frozen=True)
class BaseChange:
    """The changes of one tensor of the base, in the order in which they are applied.

    ``value`` stands in its place, for head and embedding alike where ``shared`` and the base ties the two.
    ``token_values`` stand for its rows ``tokens``. ``update`` are the tensors of a low-rank update with this
    ``scaling``. ``shift`` is added. All are fp32.
    """

    value: Tensor | None = None
    shared: bool = False
    tokens: tuple[int, ...] = ()
    token_values: Tensor | None = None
    update: tuple[Tensor, ...] = ()
    scaling: float = 1.0
    kind: str = "lora"
    shift: Tensor | None = None

    def applied(self, read: Callable[[slice], Tensor], rows: slice) -> Tensor:
        """Rows of the changed tensor, fp32. ``read`` gives those of the base's."""
        W = (read(rows) if self.value is None else self.value[rows]).float()
        chosen = [place for place, token in enumerate(self.tokens) if rows.start <= token < rows.stop]
        if self.token_values is not None and chosen:
            within = torch.tensor([self.tokens[place] - rows.start for place in chosen])
            W = W.index_copy(0, within, self.token_values[chosen])
        if self.shift is not None:
            W = W + self.shift[rows]
        return adapter_class(self.kind).merged(W, self.update, self.scaling, rows) if self.update else W

    def facts(self) -> dict[str, object]:
        """What its tensors do not say, as JSON."""
        return {"tokens": list(self.tokens), "scaling": self.scaling, "kind": self.kind}


def collect_changes(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> dict[str, BaseChange]:
    """The changes by the names of the base's tensors, from an adapter's tensors by their plain names."""
    changes: dict[str, BaseChange] = {}

    def change(name: str, **what: Any) -> None:
        changes[name] = dataclasses.replace(changes.get(name, BaseChange()), **what)

    kind = header.config.plain.kind
    parts = [name for name in tensors if ".lora_" not in name and not name.endswith(TOKENS)]
    saved = header.config.saved([name.rpartition(".")[0] for name in parts])
    for name, whole in zip(parts, saved, strict=True):
        change(name, value=tensors[name], shared=not whole)
    for module in (EMBEDDING, HEAD):
        if (rows := tensors.get(f"{module}{TOKENS}")) is not None:
            tokens = header.config.tokens(module) or header.config.tokens(EMBEDDING)
            change(f"{module}.weight", tokens=tokens, token_values=rows)
        names = [ADAPTER_KINDS[kind].stored_name(module, tensor) for tensor in ADAPTER_KINDS[kind].tensors]
        if names[0] in tensors:
            update = tuple(tensors[name] for name in names if name in tensors)
            change(f"{module}.weight", update=update, scaling=header.scalings([module])[0], kind=kind)
    biased = [name.removesuffix(".lora_B.bias") for name in tensors if name.endswith(".lora_B.bias")]
    for path, scaling in zip(biased, header.scalings(biased), strict=True):
        change(f"{path}.bias", shift=scaling * tensors[f"{path}.lora_B.bias"])
    return changes


def changed_config(
    base: LlamaConfig, changes: Mapping[str, BaseChange], tied: bool, where: object
) -> tuple[LlamaConfig, dict[str, BaseChange]]:
    """The configuration with the changes made, and the changes of its tensors.

    A head that the base ties to the embedding stays tied where both become the same: the adapter says so (``tied``), or
    it changes the tensor that they share, or both alike. Else it becomes a tensor of its own.
    """
    changes, config = dict(changes), base
    embedding, head = changes.get(EMBEDDING_WEIGHT), changes.get(HEAD_WEIGHT)
    values = [change.value for change in (embedding, head) if change is not None and change.value is not None]
    config = dataclasses.replace(base, vocab_size=len(values[0]) if values else base.vocab_size)
    for change in (embedding, head):
        if change is not None and max(change.tokens, default=0) >= config.vocab_size:
            raise CheckpointError(
                f"trains token {max(change.tokens)} of a vocabulary of {config.vocab_size}", where, "give its base"
            )
    if base.tie_word_embeddings and (embedding or head):
        embedding, head = _sharing(embedding or BaseChange(), head or BaseChange(), tied)
        same = _same(embedding, head)
        config = dataclasses.replace(config, tie_word_embeddings=same)
        changes[EMBEDDING_WEIGHT] = embedding
        changes[HEAD_WEIGHT] = head
        if same:
            del changes[HEAD_WEIGHT]
    added = {name.split(".")[-2] for name in changes if name.endswith(".bias")}
    return dataclasses.replace(config, biased_modules=_biased(base, added, where)), changes


def _biased(base: LlamaConfig, added: set[str], where: object) -> tuple[str, ...]:
    """The modules with a bias: a configuration states it of all modules of attention or feed-forward, or of none."""
    biased = set(base.biased_modules)
    if added <= biased:
        return base.biased_modules
    for module in sorted(added - biased):
        together = [modules for modules in FAMILIES[base.model_type].flags.values() if module in modules]
        if not together:
            what = f"adds a bias to {module}, which no configuration of a {base.model_type} model can state"
            raise CheckpointError(what, where, "use it in PEFT")
        biased |= set(together[0])
    return tuple(module for module in LINEAR_MODULES if module in biased)


def _sharing(embedding: BaseChange, head: BaseChange, tied: bool) -> tuple[BaseChange, BaseChange]:
    """The changes of a tied base's embedding and head, with what one states for both."""
    if head.value is None and embedding.value is not None and (embedding.shared or tied):
        head = dataclasses.replace(head, value=embedding.value)
    if embedding.value is None and head.value is not None and head.shared:
        embedding = dataclasses.replace(embedding, value=head.value)
    if not head.tokens:
        head = dataclasses.replace(head, tokens=embedding.tokens, token_values=embedding.token_values)
    if tied and not head.update:
        head = dataclasses.replace(head, update=embedding.update, scaling=embedding.scaling, kind=embedding.kind)
    return embedding, head


def _same(one: BaseChange, other: BaseChange) -> bool:
    """Whether both make the same of the same tensor."""
    for field in dataclasses.fields(BaseChange):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if field.name == "shared":
            continue
        lefts, rights = (value if isinstance(value, tuple) else (value,) for value in (left, right))
        if len(lefts) != len(rights):
            return False
        for a, b in zip(lefts, rights, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if not torch.equal(a, b):
                    return False
            elif a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
                return False
    return True
