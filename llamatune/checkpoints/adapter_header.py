"""An adapter directory before its tensors are read: which they are, by plain names, and what its configuration says.

No torch. A low-rank update has the tensors ``<module>.lora_A.weight`` (r, in) and ``<module>.lora_B.weight`` (out, r),
of an embedding too, and whoever wrote them; a tensor that stands for one of the base has its name; rows of one are
called ``<module>.token_adapter.trainable_tokens_delta``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llamatune.checkpoints.adapter_config import CONFIG_FILE, AdapterConfig, read_peft_config
from llamatune.checkpoints.huggingface_files import unwrapped
from llamatune.checkpoints.mlx_adapter import MLX_TENSORS, MLX_WEIGHTS, is_mlx, read_mlx_config
from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.formats.torch_archive import read_archive
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_path
from llamatune.strict_json import JsonFields, read_json

T = TypeVar("T")

WEIGHTS_FILE = "adapter_model.safetensors"
_ARCHIVE = "adapter_model.bin"
_NAMED_DEFAULT = "default"
"""The folder of an adapter that PEFT saved under its usual name."""
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOKENS = ".token_adapter.trainable_tokens_delta"
_TRAINED = re.compile(
    r"(?P<module>.+)\.(?P<tensor>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.default)?(?:\.(?P<part>weight|bias))?"
)
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_IN_WRAPPERS = re.compile(r"\.token_adapter(?=\.base_layer\.)|\.base_layer(?=\.)")
"""Parts of the names of whole tensors."""
_IN_BLOCK = re.compile(rf"model\.layers\.(\d{{1,4}})\.(?:{'|'.join(map(linear_path, LINEAR_MODULES))})")
_EMBEDDING_PARTS = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
"""PEFT stores (r, V) and (D, r): transposed, they are B and A of an update of the embedding's weight (V, D)."""


@dataclass(frozen=True)
class AdapterHeader:
    """``path`` is the directory with the file, ``tensors`` where it keeps each; nothing is checked against a base."""

    path: Path
    file: Path
    config: AdapterConfig
    tensors: dict[str, TensorLocation]

    @functools.cached_property
    def spec(self) -> AdapterSpec:
        """What is adapted in the blocks: a module's name where it is in all of them, else its paths."""
        layers_of: dict[str, set[int]] = {}
        for path in adapted_modules(self.tensors):
            if match := _IN_BLOCK.fullmatch(path):
                layers_of.setdefault(path.rpartition(".")[2], set()).add(int(match[1]))
        count = 1 + max((max(layers) for layers in layers_of.values()), default=-1)
        places = [(name, layer) for name, layers in layers_of.items() for layer in sorted({*layers, count})]
        paths = [f"model.{_target(name, layer)}" for name, layer in places]
        in_next = {name for (name, layer), hit in zip(places, self.config.adapted(paths, None), strict=True)
                   if hit and layer == count}  # fmt: skip
        everywhere = {name for name, layers in layers_of.items() if name in in_next and len(layers) == count}
        targets = [name if name in everywhere else _target(name, layer) for name, layer in places if layer < count]
        places = [(name, layer) for name, layer in places if layer < count or name in everywhere]
        paths = [f"model.{_target(name, layer)}" for name, layer in places]
        return dataclasses.replace(
            self.config.plain,
            target_modules=tuple(dict.fromkeys(targets)),
            module_ranks=_what_differs(places, self.config.ranks(paths), self.config.plain.r),
            module_alphas=_what_differs(places, self.config.alphas(paths), self.config.plain.alpha),
        )

    @property
    def others(self) -> tuple[tuple[str, int], ...]:
        """Modules with the trained parameters that the file holds of them beside what ``spec`` says."""
        names = [name for name in self.tensors if not is_update_in_block(name)]
        paths = [re.split(r"\.lora_|\.token_adapter|\.(?=weight$|bias$)", name)[0] for name in names]
        whole = self.config.saved(paths)
        return tuple(
            (path, math.prod(self.tensors[name].shape))
            for name, path, trained in zip(names, paths, whole, strict=True)
            if trained or path != name.rpartition(".")[0] or name.endswith(".bias")
        )

    def scalings(self, paths: Sequence[str]) -> list[float]:
        """Of the updates of these modules."""
        values = zip(self.config.ranks(paths), self.config.alphas(paths), strict=True)
        return [dataclasses.replace(self.config.plain, r=r, alpha=alpha).scaling() for r, alpha in values]

    def rows(self, base: LlamaConfig) -> int:
        """The size of the vocabulary with the adapter, which may hold a larger embedding and head than the base."""
        found = {m: self.tensors[f"{m}.weight"].shape for m in (EMBEDDING, HEAD) if f"{m}.weight" in self.tensors}
        stated = {module: shape[0] if shape else 0 for module, shape in found.items()}
        if not base.tie_word_embeddings:
            stated = {EMBEDDING: base.vocab_size, HEAD: base.vocab_size, **stated}
        if len(set(stated.values())) > 1:
            listed = " and ".join(f"{module} {rows:,}" for module, rows in stated.items())
            raise CheckpointError(f"with this adapter {listed} rows", self.file, "both must be of one vocabulary")
        return next(iter(stated.values()), base.vocab_size)

    def expected(self, base: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """The tensors that the file must hold by its configuration; what it may hold beside them if it does."""
        config, rows = self.config, self.rows(base)
        outside = {EMBEDDING: (rows, base.hidden_size), HEAD: (rows, base.hidden_size)}
        modules = {f"model.{_target(name, layer)}": base.linear_shape(name)
                   for layer in range(base.num_hidden_layers) for name in LINEAR_MODULES} | outside  # fmt: skip
        names = {name: outside.get(name.rpartition(".")[0], shape) for name, shape in base.parameter_shapes()}
        names.setdefault(f"{HEAD}.weight", outside[HEAD])
        ranks = dict(zip(modules, config.ranks(list(modules)), strict=True))
        adapted = dict(zip(modules, config.adapted(list(modules), base.num_hidden_layers), strict=True))
        if base.tie_word_embeddings and config.tied:
            ranks[HEAD], adapted[HEAD] = ranks[EMBEDDING], f"{HEAD}.lora_A.weight" in self.tensors
        if adapted[EMBEDDING] and config.fields.raw.get("use_dora"):
            config.fields.refuse(
                "use_dora", "of the embedding, DoRA in PEFT scales the columns: that is not computed here"
            )
        expected: dict[str, tuple[int, ...]] = {}
        for path, shape in modules.items():
            if adapted[path]:
                expected |= dict(self._update(path, ranks[path], shape))
        for path, ids in self.token_rows(base).items():
            follows = path == HEAD and ids == self.token_rows(base)[EMBEDDING] and base.tie_word_embeddings
            if ids and not (follows and f"{path}{TOKENS}" not in self.tensors):
                expected[f"{path}{TOKENS}"] = (len(ids), base.hidden_size)
        saved = config.saved([name.rpartition(".")[0] for name in names])
        for name, whole in zip(names, saved, strict=True):
            optional = name.rpartition(".")[0] in outside or (config.bias and name.endswith(".bias"))
            if whole or (optional and name in self.tensors):
                expected[name] = names[name]
        return expected

    def token_rows(self, base: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """Which rows of embedding and head are replaced; a tied head has the embedding's, unless others are stated."""
        embedding, head = self.config.tokens(EMBEDDING), self.config.tokens(HEAD)
        return {EMBEDDING: embedding, HEAD: head or embedding if base.tie_word_embeddings else head}

    def _update(self, path: str, r: int, shape: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        kind, sizes = ADAPTER_KINDS[self.config.plain.kind], {"r": r, "in": shape[1], "out": shape[0]}
        for name, dimensions in kind.tensors.items():
            yield kind.stored_name(path, name), tuple(sizes[dimension] for dimension in dimensions)
        if self.config.fields.raw.get("lora_bias"):
            yield f"{path}.lora_B.bias", shape[:1]


def read_adapter_header(path: Path) -> AdapterHeader:
    """Open an adapter directory of PEFT or mlx-lm; no tensor is read.

    Raises:
        CheckpointError: no adapter, a configuration that LLaMA cannot honour, a broken or unsafe file.
    """
    directory = _directory(path)
    fields = JsonFields(directory / CONFIG_FILE, read_json(directory / CONFIG_FILE))
    if is_mlx(fields):
        file = directory / MLX_WEIGHTS
        tensors = _renamed(file, _mlx_names(read_header(file)[0]))
        return AdapterHeader(directory, file, read_mlx_config(fields, adapted_modules(tensors)), tensors)
    config, file = read_peft_config(fields), directory / WEIGHTS_FILE
    if not file.exists() and (directory / _ARCHIVE).exists():
        file = directory / _ARCHIVE
    entries = read_archive(file) if file.name == _ARCHIVE else read_header(file)[0]
    return AdapterHeader(directory, file, config, _renamed(file, _peft_names(entries)))


def adapted_modules(tensors: Iterable[str]) -> list[str]:
    """The paths of the modules with a low-rank update."""
    return sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})


def is_update_in_block(name: str) -> bool:
    """Whether a tensor belongs to the low-rank update of a linear layer's matrix."""
    module, _, tensor = name.partition(".lora_")
    return bool(tensor) and tensor != "B.bias" and _IN_BLOCK.fullmatch(module) is not None


def _directory(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError("no such adapter directory", path)
    if not path.is_dir():
        gguf = "adapters in GGUF are not read: give the directory that it was made from"
        todo = gguf if path.suffix == ".gguf" else "give the directory that holds it"
        raise CheckpointError("a file where an adapter directory is expected", path, todo)
    if (path / CONFIG_FILE).exists():
        return path
    if (path / _NAMED_DEFAULT / CONFIG_FILE).exists():
        return path / _NAMED_DEFAULT
    nested = next((config.parent for config in sorted(path.glob(f"*/{CONFIG_FILE}"))), None)
    todo = "give a PEFT adapter directory" if nested is None else f"did you mean {nested}?"
    raise CheckpointError(f"no {CONFIG_FILE} in it", path, todo)


def _renamed(file: Path, named: Iterator[tuple[str, TensorLocation]]) -> dict[str, TensorLocation]:
    tensors: dict[str, TensorLocation] = {}
    for name, location in named:
        if name in tensors:
            raise CheckpointError(f"two tensors are called {name}", file, "save the adapter again")
        tensors[name] = location
    return tensors


def _peft_names(entries: dict[str, TensorLocation]) -> Iterator[tuple[str, TensorLocation]]:
    for stored, location in entries.items():
        name = unwrapped(stored)
        if not name.startswith(PREFIX):
            yield f"({stored})", location
            continue
        name = name.removeprefix(PREFIX)
        if match := _TRAINED.fullmatch(name):
            tensor, part = match["tensor"], match["part"]
            if tensor in _EMBEDDING_PARTS:
                yield f"{match['module']}.{_EMBEDDING_PARTS[tensor]}.weight", _transposed(location)
            elif tensor in ("lora_A", "lora_B"):
                yield f"{match['module']}.{tensor}.{part or '(none)'}", location
            else:
                yield f"{match['module']}.{tensor}", location
        elif ".original_module." in name:  # the base's own, beside what replaces it
            continue
        elif (plain := _SAVED.sub("", name)) == name or f"{PREFIX}{plain}" not in entries:  # else it is there twice
            yield _IN_WRAPPERS.sub("", plain), location


def _mlx_names(entries: dict[str, TensorLocation]) -> Iterator[tuple[str, TensorLocation]]:
    for stored, location in entries.items():
        module, _, tensor = stored.rpartition(".")
        if tensor not in MLX_TENSORS:
            yield f"({stored})", location
        elif module == EMBEDDING and tensor != "m":  # (V, r) and (r, D): B and A of its weight
            yield f"{module}.{'lora_B' if tensor == 'lora_a' else 'lora_A'}.weight", location
        else:
            yield f"{module}.{MLX_TENSORS[tensor]}", _transposed(location)


def _transposed(location: TensorLocation) -> TensorLocation:
    """The same bytes as the transposed matrix; what is no matrix is left as it is, and does not fit."""
    if len(location.shape) != 2:
        return location
    strides = location.strides or (location.shape[1], 1)
    return dataclasses.replace(location, shape=location.shape[::-1], strides=strides[::-1])


def _target(module: str, layer: int) -> str:
    return f"layers.{layer}.{linear_path(module)}"


def _what_differs(places: Sequence[tuple[str, int]], values: Sequence[T], plain: T) -> tuple[tuple[str, T], ...]:
    """The values that are not ``plain``: under a module's name where it has one in all places, else under its paths."""
    of_module: dict[str, set[T]] = {}
    for (name, _), value in zip(places, values, strict=True):
        of_module.setdefault(name, set()).add(value)
    found = {name if len(of_module[name]) == 1 else _target(name, layer): value
             for (name, layer), value in zip(places, values, strict=True)}  # fmt: skip
    return tuple((key, value) for key, value in found.items() if value != plain)
