"""Where a Hugging Face directory keeps its tensors: safetensors or PyTorch archives, whole, in shards, or a variant.

No torch. Of weights, only headers are read.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llamatune.errors import CheckpointError, SpecError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.formats.torch_archive import read_archive
from llamatune.strict_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 16 << 20
_SHARD_BYTES = 5_000_000_000
_SHARD_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)*[A-Za-z0-9][\w.-]*", re.ASCII)
_VARIANT = re.compile(r"(?:pytorch_)?model(?:\.(\w+))?\.(?:safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?", re.ASCII)
_WITHOUT_VARIANT = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, DDP, FSDP and checkpointing leave in a state dict."""
_BUFFERS = re.compile(r"(?:.*\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
"""Old checkpoints store the rotary frequencies, which the configuration determines."""
_BASE_MODEL = re.compile(r"(?:embed_tokens|layers\.\d+|norm)\..*")
_VALUE_HEAD = "v_head."


class _Source(NamedTuple):
    """The file, or the index of its shards; ``variant`` as in ``model.fp16.safetensors``."""

    path: Path
    is_index: bool
    variant: str | None


def locate_huggingface(
    directory: Path, on_event: OnEvent = ignore_event, variant: str | None = None
) -> dict[str, TensorLocation]:
    """The tensors by their names in a ``LlamaForCausalLM``, of one file or of the shards that an index names.

    Args:
        variant: of the weights, as ``fp16`` in ``model.fp16.safetensors``; None: those without a variant's name.

    Raises:
        CheckpointError: no weights, or not this variant; a shard outside the directory, an index that disagrees with
            its shards, a broken or unsafe file.
    """
    sources = list(_sources(directory))
    source = next((source for source in sources if source.variant == variant), None)
    if source is None:
        raise _no_variant(directory, variant, sources) if sources else _no_weights(directory)
    read = _read_index if source.is_index else _read_tensors
    return _plain_names(read(source.path), source.path, on_event)


def files_of(tensors: Mapping[str, TensorLocation]) -> list[list[tuple[str, TensorLocation]]]:
    """The tensors of each file, in the order in which they lie in it."""
    in_order = sorted(tensors.items(), key=lambda item: (item[1].path, item[1].begin))
    return [list(file) for _, file in itertools.groupby(in_order, key=lambda item: item[1].path)]


def shard_names(count: int) -> list[str]:
    """Of the files that are written: ``model.safetensors``, or numbered ones."""
    return [SINGLE_FILE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def plan_shards(sizes: Mapping[str, int], count: int | None = None, shard_bytes: int | None = None) -> list[list[str]]:
    """The tensors of each file, in their order: ``count`` files of about one size, or such as fit."""
    most, total = shard_bytes or _SHARD_BYTES, sum(sizes.values())
    if count is not None and count > len(sizes):
        raise SpecError(f"--shards {count} for {len(sizes)} tensors", None, "ask for fewer")
    shards: list[list[str]] = [[]]
    size = done = 0
    for left, (name, tensor_size) in zip(range(len(sizes), 0, -1), sizes.items(), strict=True):
        if count is None:
            full = size + tensor_size > most
        else:
            missing = count - len(shards)
            full = missing > 0 and (left == missing or (done + tensor_size / 2) * count > total * len(shards))
        if shards[-1] and full:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, done = size + tensor_size, done + tensor_size
    return shards


def has_huggingface_weights(directory: Path) -> bool:
    """Whether there are weights at all."""
    return next(_sources(directory), None) is not None


def list_faults(faults: Mapping[str, Sequence[str]]) -> str:
    """``missing: a, b; unexpected: c`` for the faults that have names, the first five of each."""
    return "; ".join(
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in faults.items()
        if names
    )


def _sources(directory: Path) -> Iterator[_Source]:
    """What may be read, best first: what has no variant's name, safetensors before archives, whole before shards."""
    for name in _WITHOUT_VARIANT:
        if os.path.lexists(directory / name):
            yield _Source(directory / name, name.endswith(".json"), None)
    for path in sorted(directory.iterdir(), key=lambda path: (".bin" in path.name, path.name)):
        match = _VARIANT.fullmatch(path.name)
        if match and (variant := match[1] or match[2]):
            yield _Source(path, path.name.endswith(".json"), variant)


def _read_tensors(path: Path) -> dict[str, TensorLocation]:
    return read_archive(path) if path.suffix == ".bin" else read_header(path)[0]


def _read_index(index: Path) -> dict[str, TensorLocation]:
    weight_map = read_json(index, max_bytes=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", index, "fetch it again")
    suffix = ".bin" if ".bin." in index.name else ".safetensors"
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or not shard.endswith(suffix):
            todo = "a shard is a file beside the index, or in a folder below"
            raise CheckpointError(f"unsafe shard name {shard!r} for {name}", index, todo)
    tensors: dict[str, TensorLocation] = {}
    unlisted, twice = [], []
    for shard in sorted(set(weight_map.values())):
        stored = _read_tensors(index.parent / shard)
        tensors |= {name: location for name, location in stored.items() if weight_map.get(name) == shard}
        unlisted += [name for name in stored if name not in weight_map]
        twice += [name for name in stored if weight_map.get(name, shard) != shard]
    absent = weight_map.keys() - tensors.keys()
    faults = {"not in its shard": absent, "not in the index": unlisted, "stored twice": twice}
    if listed := list_faults({what: sorted(names) for what, names in faults.items()}):
        raise CheckpointError(f"the index disagrees with the shards ({listed})", index, "fetch them again")
    return tensors


def _plain_names(tensors: Mapping[str, TensorLocation], path: Path, on_event: OnEvent) -> dict[str, TensorLocation]:
    """The same under the names of a plain model, without what is no part of it; notices say what was changed."""
    steps: list[tuple[str, Callable[[str], str | None]]] = [
        ("", lambda name: None if _BUFFERS.fullmatch(name) else name),
        ("names hold parts that torch's wrappers left, which are dropped", unwrapped),
        ("the value head (v_head) is no part of the model and is not read", _without_value_head),
        ("names lack the part 'model.', which is added", lambda n: f"model.{n}" if _BASE_MODEL.fullmatch(n) else n),
    ]
    for what, rename in steps:
        renamed: dict[str, TensorLocation] = {}
        for name, location in tensors.items():
            plain = rename(name)
            if plain in renamed:
                raise CheckpointError(f"two tensors are called {plain}", path, "fetch it again")
            if plain is not None:
                renamed[plain] = location
        if what and renamed.keys() != tensors.keys():
            on_event(Notice(f"{path}: {what}"))
        tensors = renamed
    return dict(tensors)


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers leave."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_value_head(name: str) -> str | None:
    return None if name.startswith(_VALUE_HEAD) else name


def _no_variant(directory: Path, variant: str | None, sources: Sequence[_Source]) -> CheckpointError:
    known = sorted({source.variant for source in sources if source.variant is not None})
    if variant is not None:
        todo = f"there is {', '.join(known)}" if known else "leave --variant out (of a run: model.variant)"
        return CheckpointError(f"no variant {variant!r} of the weights", directory, todo)
    those = f"only the variant {known[0]}" if len(known) == 1 else f"only variants ({', '.join(known)})"
    return CheckpointError(
        f"{those} of the weights", directory, f"pass --variant {known[0]} (of a run: model.variant={known[0]})"
    )


def _no_weights(directory: Path) -> CheckpointError:
    what, todo = f"no weights ({SINGLE_FILE} or {INDEX_FILE})", "fetch the weights beside config.json"
    if any(directory.glob("*.safetensors")):
        what, todo = f"safetensors files but no {INDEX_FILE}", "fetch the index too"
    elif any(directory.glob("*.bin")):
        what, todo = (
            "files in .bin but neither pytorch_model.bin nor its index",
            "fetch pytorch_model.bin.index.json too",
        )
    elif any(directory.glob("*.gguf")):
        what, todo = "only a GGUF file", "make a model directory of it with llamatune convert"
    return CheckpointError(what, directory, todo)
