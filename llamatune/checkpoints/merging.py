"""Folds an adapter into its base, tensor by tensor: in fp32, rounded once, and saying what the rounding cost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter
from llamatune.checkpoints.checkpoint import DTYPE_NAMES, Checkpoint
from llamatune.checkpoints.config_files import merge_manifest
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.huggingface import (
    HuggingFaceCheckpoint,
    copy_config_files,
    plan_shards,
    write_config_files,
    write_shards,
)
from llamatune.checkpoints.loading import open_checkpoint, warn_of_missing_head
from llamatune.checkpoints.meta import MetaCheckpoint
from llamatune.checkpoints.meta_writer import write_consolidated, write_params
from llamatune.checkpoints.tensors import is_finite
from llamatune.checkpoints.tokenizer_files import copy_file, copy_huggingface_tokenizer, copy_meta_tokenizer
from llamatune.durable_writing import refuse_occupied, refuse_small_disk
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.manifest import MANIFEST, Manifest, Staging, build_directory, finished_product
from llamatune.model.adapters.apply import adapter_class

_PORTION = 1 << 19
"""Weights folded at once: their fp32 values stay in the processor's cache."""


@dataclass(frozen=True)
class MergeOptions:
    """What to merge, and how to write it; ``same`` means as the base has it."""

    model: Path
    adapter: Path
    output: Path
    format: Literal["same", "hf", "meta"] = "same"
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    force_base: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was written. Errors compare the stored weights with their fp32 values.

    ``vanished_fraction`` is, of the weights that the adapter changes, the share that rounding put back onto the
    base's value. ``already_done``: the output was there before, from the same inputs.
    """

    output: str
    format: str
    dtype: str
    tensors: int
    merged_tensors: int
    max_abs_error: float
    vanished_fraction: float
    bytes: int
    already_done: bool = False


@dataclass
class _Tally:
    max_abs_error: float = 0.0
    changed: int = 0
    vanished: int = 0
    merged_tensors: int = 0
    not_finite: list[str] = field(default_factory=list)

    @property
    def vanished_fraction(self) -> float:
        return self.vanished / self.changed if self.changed else 0.0


def merge_lora(
    options: MergeOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> MergeReport:
    """Write the base with the adapter folded in, as a model directory of its own, all at once or not at all.

    Raises:
        CheckpointError: the adapter does not belong to the base, or is already in it; a weight overflows the dtype.
        EnvironmentFault: the output is occupied, or the disk is too small.
        Stopped: ``should_stop`` said so; nothing is left behind.
    """
    checkpoint = open_checkpoint(options.model)
    adapter = load_adapter(options.adapter)
    _refuse_own_inputs(options)
    format_ = checkpoint.format if options.format == "same" else options.format
    dtype = None if options.dtype == "same" else DTYPE_NAMES[options.dtype]
    base_fingerprint = fingerprint(checkpoint)
    inputs = {
        "base_fingerprint": base_fingerprint,
        "adapter_sha256": adapter.digest,
        "adapter_config": adapter.config.facts(),
        "format": format_,
        "dtype": options.dtype,
    }
    finished = finished_product(options.output, "merged", inputs)
    if finished is not None:
        return _report_again(finished, options.output)
    refuse_occupied(options.output, options.overwrite)
    before = merge_manifest(options.model)
    merged_before = before.merged_adapters if before else []
    if adapter.digest in merged_before:
        raise CheckpointError(
            "this adapter is already merged into the model", options.model, "give the base it was trained on"
        )
    warn_of_missing_head(checkpoint, on_event)
    check_adapter(adapter, checkpoint.config, base_fingerprint, options.force_base, on_event)
    needed = _bytes_to_write(checkpoint, dtype)
    refuse_small_disk(options.output, needed, "the merged model")

    with (
        _workers() as workers,
        build_directory(options.output, "merged", inputs, options.overwrite) as staging,
    ):
        source = _MergedTensors(checkpoint, adapter, dtype, on_event, should_stop, workers)
        _write(staging, format_, checkpoint, source, dtype, on_event)
        tally = source.tally
        report = MergeReport(
            output=str(options.output),
            format=format_,
            dtype=str(dtype or checkpoint.dtype(checkpoint.names[0])).removeprefix("torch."),
            tensors=len(checkpoint.names),
            merged_tensors=tally.merged_tensors,
            max_abs_error=tally.max_abs_error,
            vanished_fraction=tally.vanished_fraction,
            bytes=needed,
        )
        staging.facts.update(
            adapters=[*merged_before, adapter.digest],
            template=adapter.template if adapter.template is not None or before is None else before.template,
            base_fingerprint=base_fingerprint,
            base_forced=adapter.base_fingerprint not in (None, base_fingerprint),
            report=asdict(report),
        )
        if format_ == "meta":  # params.json has no word for it
            staging.facts["max_position_embeddings"] = checkpoint.config.max_position_embeddings
    if tally.not_finite:
        on_event(
            Notice(f"{options.model}: {tally.not_finite[0]} holds NaN or infinity, and so does the copy", "warning")
        )
    return report


def _workers() -> ThreadPoolExecutor:
    """Threads that each fold a portion alone: portions are too small for torch to share one among all cores."""
    return ThreadPoolExecutor(min(16, torch.get_num_threads()), initializer=torch.set_num_threads, initargs=(1,))


class _MergedTensors:
    """The merged model's tensors by name, each made when it is asked for; counts what rounding does to them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        dtype: torch.dtype | None,
        on_event: OnEvent,
        should_stop: ShouldStop,
        workers: ThreadPoolExecutor,
    ) -> None:
        self.checkpoint, self.adapter, self.dtype, self.workers = checkpoint, adapter, dtype, workers
        self.on_event, self.should_stop = on_event, should_stop
        self.tally, self.done = _Tally(), 0

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.checkpoint.dtype(name)

    def __call__(self, name: str) -> torch.Tensor:
        if self.should_stop():
            raise Stopped("stopped while merging", self.checkpoint.path, "run the same command again")
        W, trained, dtype = self.checkpoint.tensor(name), self.adapter.trained(name), self.dtype_of(name)
        if trained:
            result = self._fold(name, W, trained, dtype)
        else:
            result = W.to(dtype)
            if dtype != W.dtype and not is_finite(result):
                self._refuse_overflow(name, W, dtype)
        self.done += 1
        self.on_event(Progress("merging", self.done, len(self.checkpoint.names)))
        return result

    def _fold(self, name: str, W: torch.Tensor, trained: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        result = torch.empty(W.shape, dtype=dtype)
        rows, spec = max(1, _PORTION // W.shape[1]), self.adapter.config
        merged, scaling = adapter_class(spec.kind).merged, spec.scaling(name.split(".")[-2])

        def fold(first: int) -> tuple[float, int, int]:
            part = slice(first, first + rows)
            base = W[part]
            exact = merged(base, trained, scaling, part)
            rounded = result[part].copy_(exact)
            changed = exact != base.float()
            vanished = changed & (rounded == base.to(dtype))
            error = float((rounded.float() - exact).abs_().max())
            if not error < float("inf"):  # infinity, or NaN
                self._refuse_overflow(name, exact, dtype)
                error = 0.0
            return error, int(torch.count_nonzero(changed)), int(torch.count_nonzero(vanished))

        for error, changed, vanished in self.workers.map(fold, range(0, W.shape[0], rows)):
            self.tally.max_abs_error = max(self.tally.max_abs_error, error)
            self.tally.changed += changed
            self.tally.vanished += vanished
        self.tally.merged_tensors += 1
        return result

    def _refuse_overflow(self, name: str, exact: torch.Tensor, dtype: torch.dtype) -> None:
        """Weights that were finite must stay finite; a base that holds NaN itself is only remarked upon."""
        finite = exact.float()
        largest = float(finite[finite.isfinite()].abs().max()) if bool(finite.isfinite().any()) else 0.0
        if largest > torch.finfo(dtype).max:
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds {largest:g}, which {kind} cannot hold", self.checkpoint.path, "choose another --dtype"
            )
        if name not in self.tally.not_finite:
            self.tally.not_finite.append(name)


def _write(
    staging: Staging,
    format_: str,
    checkpoint: Checkpoint,
    source: _MergedTensors,
    dtype: torch.dtype | None,
    on_event: OnEvent,
) -> None:
    """Same format: the base's own layout and files. The other: a directory as its users would expect it."""
    config, directory = checkpoint.config, staging.path
    if isinstance(checkpoint, HuggingFaceCheckpoint) and format_ == "hf":
        shards = [
            [(name, source.dtype_of(name), checkpoint.shape(name)) for name in names] for names in checkpoint.layout()
        ]
        write_shards(staging, shards, source)
        copy_config_files(checkpoint, directory, dtype)
        copy_huggingface_tokenizer(checkpoint.path, directory, on_event)
    elif format_ == "hf":
        write_shards(staging, plan_shards(config, source.dtype_of), source)
        write_config_files(directory, config, dtype or checkpoint.dtype(checkpoint.names[0]))
        copy_huggingface_tokenizer(checkpoint.path, directory, on_event)
    elif isinstance(checkpoint, MetaCheckpoint):
        write_consolidated(
            directory, config, source, source.dtype_of, len(checkpoint.shards), checkpoint.embedding_axis, False
        )
        copy_file(checkpoint.path / "params.json", directory)
        copy_meta_tokenizer(checkpoint.path, directory, on_event)
    else:
        write_params(directory, config)
        write_consolidated(directory, config, source, source.dtype_of)
        copy_meta_tokenizer(checkpoint.path, directory, on_event)


def _report_again(manifest: Manifest, output: Path) -> MergeReport:
    try:
        report = dict(manifest.facts["report"])
        known = {field.name: report[field.name] for field in fields(MergeReport)}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("its manifest holds no report", output / MANIFEST, "choose another output") from None
    return MergeReport(**{**known, "output": str(output), "already_done": True})


def _refuse_own_inputs(options: MergeOptions) -> None:
    output = options.output.resolve()
    for option, path in (("--model", options.model), ("--adapter", options.adapter)):
        if output == path.resolve() or output in path.resolve().parents:
            raise SpecError(f"--output would replace {option}", options.output, "choose another output")


def _bytes_to_write(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    return sum(
        torch.Size(checkpoint.shape(name)).numel() * (dtype or checkpoint.dtype(name)).itemsize
        for name in checkpoint.names
    )
