"""Loads a model directory of either format into a ``Transformer``; peak memory is the model and one tensor.

Of streamed blocks it is what this process stores of them, their rooms and one tensor, or the rows of it that it stores.
Where packed weights are rearranged for generation, it is the model and the largest matrix of a product.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.huggingface_weights import HuggingFaceCheckpoint
from llamatune.checkpoints.meta_weights import MetaCheckpoint
from llamatune.checkpoints.model_directory import detect_format, warn_of_missing_head
from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.host_memory import freed_at_once, give_back
from llamatune.model.huge_pages import HugePages, room_of
from llamatune.model.joined_products import copied_modules, join_products
from llamatune.model.packed_weight import PackedWeight, hold_quantized
from llamatune.model.streamed_blocks import StreamedBlocks
from llamatune.model.transformer import Block, Transformer
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_module

_LEAST_MAPPED = 1 << 20
"""Bytes of a tensor from which on it may stay in the page cache: Linux maps up to 64 KiB on either side of it, too."""
_GIVEN_BACK_AT = 32 << 20
"""Bytes that are read, and converted or quantised, until what was freed by that is given back."""
_WEIGHTS_PER_REUSED_BYTE = 32
"""So that what is kept of freed memory is a few hundredths of the model's."""


def open_checkpoint(path: Path, on_event: OnEvent = ignore_event, variant: str | None = None) -> Checkpoint:
    """Open a model directory of either format and check it completely, before any tensor is read.

    Notices say what is read in another way than it is stored. ``variant`` as ``locate_huggingface`` has it.

    Raises:
        CheckpointError: no model directory, a model that is not LLaMA, missing, unexpected or misshapen tensors,
            broken or unsafe files.
    """
    return (MetaCheckpoint if detect_format(path) == "meta" else HuggingFaceCheckpoint).open(path, on_event, variant)


@torch.no_grad()
def load_rows(
    checkpoint: Checkpoint,
    slices: Mapping[str, tuple[torch.Tensor, range]],
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
) -> list[str]:
    """Fill each tensor with its rows of a checkpoint's, cast to its dtype; the names where they are not finite."""
    warn_of_missing_head(checkpoint.path, checkpoint.format, checkpoint.config, on_event)
    broken = []
    for done, (name, (into, rows)) in enumerate(slices.items()):
        _refuse_stop(should_stop, checkpoint)
        if rows:
            into.copy_(checkpoint.rows(name, rows))
        if not is_finite(into):
            broken.append(name)
        on_event(Progress("loading", done + 1, len(slices)))
    return broken


def warn_of_broken(names: list[str], checkpoint: Checkpoint, on_event: OnEvent) -> None:
    """A notice about weights that are not finite."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        on_event(Notice(f"{checkpoint.path}: the weights of {names[0]}{more} hold NaN or infinity", "warning"))


def _modules_in_pages(config: LlamaConfig, kind: type[PackedWeight], joined: bool) -> list[str]:
    """The linear layers whose codes go to huge pages: what is rearranged takes room of its own."""
    return [name for name in LINEAR_MODULES if not (joined and kind.is_rearranged(config.elements_of_product(name)))]


def _bytes_of_codes(config: LlamaConfig, kind: type[PackedWeight], modules: Collection[str]) -> int:
    """What the codes of these linear layers of all blocks take in huge pages."""
    codes = [kind.storage(config.linear_shape(name))["codes"] for name in modules]
    return config.num_hidden_layers * sum(room_of(math.prod(shape) * dtype.itemsize) for dtype, shape in codes)


def _ends_of_blocks(names: list[str]) -> dict[str, int]:
    """The last tensor of each block, and which block that is."""
    last = {int(name.split(".")[2]): name for name in names if ".layers." in name}
    return {name: layer for layer, name in last.items()}


def _refuse_stop(should_stop: ShouldStop, checkpoint: Checkpoint) -> None:
    if should_stop():
        raise Stopped("stopped while loading the model", checkpoint.path, "run the same command again")


def load_model(
    source: Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    num_layers: int | None = None,
    writable: bool = False,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    quantized: Callable[[str], PackedWeight | None] | None = None,
    streamed: StreamedBlocks | None = None,
    joined: bool = False,
) -> Transformer:
    """Build the model and fill it with a checkpoint's weights, all frozen (``requires_grad`` false).

    Args:
        source: a model directory or an opened checkpoint.
        dtype: what the weights are held in; None: as stored.
        device: where they go, one tensor after the other, straight from the file's pages.
        num_layers: keep only the first blocks.
        writable: the caller will change weights in place, or outlive the file, so none may stay mapped from it.
            Without it, CPU weights that need no conversion are shared with the page cache.
        quantized: gives what is to be held quantised by its name, on the device; None for what stays in ``dtype``.
        streamed: stores the blocks, whose tensors in the model become views of its rooms.
        joined: join products of the blocks where that is faster, on a CPU without gradients, and use freed blocks of
            memory again from then on (``host_memory.reuse_freed``).

    Quantised weights on a CPU are held in huge pages where the system gives them, unless they are few, or are
    rearranged for generation (``PackedWeight.rearrange``), block by block.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, on_event)
    warn_of_missing_head(checkpoint.path, checkpoint.format, checkpoint.config, on_event)
    config = checkpoint.config.with_layers(num_layers)
    device = torch.device(device)
    reused = sum(math.prod(shape) for _, shape in config.parameter_shapes()) // _WEIGHTS_PER_REUSED_BYTE
    with freed_at_once(reused) if joined else contextlib.nullcontext():
        with torch.device("meta"):
            model = Transformer(config)
        names = [name for name, _ in config.parameter_shapes()]
        assert set(names) == {name for name, _ in model.named_parameters()}, "the model's names are the checkpoint's"
        broken, joined_by_copy = [], copied_modules(config) if joined else frozenset()
        pages: HugePages | None = None
        in_pages: list[str] = []
        ends = _ends_of_blocks(names)
        unshared_bytes = 0
        for done, name in enumerate(names):
            _refuse_stop(should_stop, checkpoint)
            path, _, attribute = name.rpartition(".")
            stored, shared = checkpoint.dtype(name), False
            stored_bytes = math.prod(checkpoint.shapes[name]) * stored.itemsize
            if quantized is not None and (packed := quantized(name)) is not None:
                if streamed is not None:
                    streamed.hold_packed(name, packed)
                else:
                    if pages is None:
                        in_pages = _modules_in_pages(config, type(packed), joined)
                        pages = HugePages(_bytes_of_codes(config, type(packed), in_pages), device)
                    if linear_module(name) in in_pages:
                        packed.hold_in(pages)
                hold_quantized(model.get_submodule(path), packed)
            else:
                rows = None if streamed is None else streamed.rows_kept(name)
                if rows is None or len(rows) == checkpoint.shapes[name][0]:
                    is_joined = path.rpartition(".")[2] in joined_by_copy
                    shared = stored_bytes >= _LEAST_MAPPED and not (writable or is_joined) and dtype in (None, stored)
                    copied = rows is not None or device.type != "cpu"
                    tensor = checkpoint.tensor(name, mapped=shared or copied)
                else:
                    tensor = checkpoint.rows(name, rows)
                tensor = tensor.to(device)
                if dtype is not None:
                    tensor = tensor.to(dtype)  # on the device, which casts quicker than a CPU
                if not is_finite(tensor):
                    broken.append(name)
                if streamed is not None and rows is not None:
                    tensor = streamed.hold(name, tensor, rows.start)
                setattr(model.get_submodule(path), attribute, torch.nn.Parameter(tensor, requires_grad=False))
            if joined and (layer := ends.get(name)) is not None:
                block = model.model.layers[layer]
                assert isinstance(block, Block)
                join_products(block, config)
            unshared_bytes += 0 if shared else stored_bytes
            if device.type == "cpu" and unshared_bytes >= _GIVEN_BACK_AT:
                give_back()
                unshared_bytes = 0
            on_event(Progress("loading", done + 1, len(names)))
        if streamed is not None:
            broken = streamed.named_anywhere(broken)
        warn_of_broken(broken, checkpoint, on_event)
        if device.type == "cpu":
            give_back()
    return model
