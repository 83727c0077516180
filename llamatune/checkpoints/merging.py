"""Merges an adapter into its base, tensor by tensor: in fp32, rounded once, with a report of the rounding errors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.companion_files import complete_merged
from llamatune.checkpoints.config_json import EMBEDDING
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.checkpoints.model_directory import warn_of_missing_head
from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.checkpoints.weights import Weight
from llamatune.command_options.inference import MergeOptions
from llamatune.durable_writing import refuse_occupied, refuse_small_disk
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.manifest import MANIFEST, Manifest, build_directory, finished_product, manifest_if_readable
from llamatune.model.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES

_FOLDED_WEIGHTS = 1 << 17
"""Folded at once: their fp32 values stay in the processor's cache."""


@dataclass(frozen=True)
class MergeReport:
    """What was written. Errors compare the stored weights with their fp32 values.

    ``vanished_fraction``: the share of the weights changed by the adapter that rounding returned to the base's value.
    ``already_done``: the output existed before, made of the same inputs.
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


def merge_lora(
    options: MergeOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> MergeReport:
    """Write the base with the adapter merged into it, as a model directory, all at once or not at all.

    Raises:
        CheckpointError: the adapter does not belong to the base, or is already in it; a weight overflows the dtype.
        EnvironmentFault: the output is occupied, or the disk is too small.
        Stopped: ``should_stop`` said so; nothing is left behind.
    """
    checkpoint = open_checkpoint(options.model, on_event, options.variant)
    adapter = load_adapter(options.adapter)
    _refuse_own_inputs(options)
    format_ = checkpoint.format if options.format == "same" else options.format
    dtype = None if options.dtype == "same" else TORCH_DTYPES[options.dtype]
    base_fingerprint = fingerprint(checkpoint)
    inputs = {
        "base_fingerprint": base_fingerprint,
        "adapter_sha256": adapter.digest,
        "adapter_config": adapter.facts(),
        "format": format_,
        "dtype": options.dtype,
    }
    finished = finished_product(options.output, "merged", inputs)
    if finished is not None:
        return _stored_report(finished, options.output)
    refuse_occupied(options.output, options.overwrite)
    before = manifest_if_readable(options.model)
    merged_before = before.merged_adapters if before else []
    if adapter.digest in merged_before:
        raise CheckpointError(
            "this adapter is already merged into the model", options.model, "give the base it was trained on"
        )
    warn_of_missing_head(checkpoint.path, checkpoint.format, checkpoint.config, on_event)
    check_adapter(adapter, checkpoint.config, base_fingerprint, options.force_base, on_event)
    checkpoint = adapter.on(checkpoint)
    needed = sum(
        math.prod(shape) * (dtype or checkpoint.dtype(name)).itemsize for name, shape in checkpoint.shapes.items()
    )
    refuse_small_disk(options.output, needed, "the merged model")

    # Each thread merges a portion alone: portions are too small for torch to split one among all cores.
    threads = min(16, torch.get_num_threads())
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers,
        build_directory(options.output, "merged", inputs, options.overwrite) as staging,
    ):
        merged = _MergedWeights(checkpoint, adapter, dtype, workers, 2 * threads, on_event, should_stop)
        if format_ == checkpoint.format:
            checkpoint.write_copy(staging, merged, dtype, on_event)
        else:
            write = write_huggingface if format_ == "hf" else write_meta
            write(staging, checkpoint.config, merged, merged.dtype_of, checkpoint.path, on_event)
        report = MergeReport(
            output=str(options.output),
            format=format_,
            dtype=DTYPE_NAMES[merged.dtype_of(EMBEDDING)],
            tensors=len(checkpoint.shapes),
            merged_tensors=merged.merged_tensors + len(adapter.base_changes),
            max_abs_error=merged.max_abs_error,
            vanished_fraction=merged.vanished / merged.changed if merged.changed else 0.0,
            bytes=needed,
        )
        rounding = {"stored as": report.dtype, "fell back to the base's value": f"{report.vanished_fraction:.2%}"}
        complete_merged(staging.path, format_, options.model, adapter, options.adapter, rounding)
        staging.facts.update(
            adapters=[*merged_before, adapter.digest],
            template=adapter.template if adapter.template is not None or before is None else before.template,
            base_fingerprint=base_fingerprint,
            base_forced=adapter.base_fingerprint not in (None, base_fingerprint),
            report=asdict(report),
        )
        if format_ == "meta":  # params.json has no key for it
            staging.facts["max_position_embeddings"] = checkpoint.config.max_position_embeddings
    if merged.not_finite:
        warning = f"{options.model}: {merged.not_finite[0]} holds NaN or infinity, and so does the copy"
        on_event(Notice(warning, "warning"))
    return report


class _Portion(NamedTuple):
    """Rows of a merged weight, and what rounding did to them."""

    weights: torch.Tensor
    error: float = 0.0
    changed: int = 0
    vanished: int = 0


@dataclass
class _MergedWeights:
    """The merged model's weights by name, each made while it is written; counts the effects of rounding."""

    checkpoint: Checkpoint
    adapter: Adapter
    dtype: torch.dtype | None
    workers: ThreadPoolExecutor
    ahead: int
    on_event: OnEvent
    should_stop: ShouldStop
    done: int = 0
    merged_tensors: int = 0
    max_abs_error: float = 0.0
    changed: int = 0
    vanished: int = 0
    not_finite: list[str] = field(default_factory=list)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.checkpoint.dtype(name)

    def __call__(self, name: str) -> Weight:
        if self.should_stop():
            raise Stopped("stopped while merging", self.checkpoint.path, "run the same command again")
        self.done += 1
        self.on_event(Progress("merging", self.done, len(self.checkpoint.shapes)))
        if self.adapter.changes(name):
            self.merged_tensors += 1
            return self._in_order(name, self._fold)
        if self.checkpoint.is_made(name) or self.dtype_of(name) != self.checkpoint.dtype(name):
            return self._in_order(name, self._cast)
        return self.checkpoint.stored(name)

    def _in_order(self, name: str, make: Callable[..., _Portion]) -> Iterator[torch.Tensor]:
        """Portions of rows in order, a few of them made ahead by the workers."""
        read, made = self.checkpoint.row_reader(name), deque[Future[_Portion]]()
        for rows in self.checkpoint.row_portions(name):
            made.append(self.workers.submit(make, name, read, rows, self.dtype_of(name)))
            if len(made) > self.ahead:
                yield self._counted(made.popleft().result())
        while made:
            yield self._counted(made.popleft().result())

    def _counted(self, portion: _Portion) -> torch.Tensor:
        self.max_abs_error = max(self.max_abs_error, portion.error)
        self.changed += portion.changed
        self.vanished += portion.vanished
        return portion.weights

    def _cast(self, name: str, read: Callable[[slice], torch.Tensor], rows: slice, dtype: torch.dtype) -> _Portion:
        W = read(rows)
        result = W.to(dtype)
        if not is_finite(result):
            self._refuse_overflow(name, W, dtype)
        return _Portion(result)

    def _fold(self, name: str, read: Callable[[slice], torch.Tensor], rows: slice, dtype: torch.dtype) -> _Portion:
        base = read(rows)
        made = _Portion(torch.empty(base.shape, dtype=dtype))
        step = max(1, _FOLDED_WEIGHTS // math.prod(base.shape[1:]))
        for first in range(0, len(base), step):
            part = slice(first, min(first + step, len(base)))
            W = base[part]
            wide = W.float()
            exact = self.adapter.merged(name, W, slice(rows.start + part.start, rows.start + part.stop))
            rounded = made.weights[part].copy_(exact).to(torch.float32, copy=True)
            rounding = exact - rounded
            error = max(float(rounding.amax()), -float(rounding.amin()))
            if not error < float("inf"):  # infinity, or NaN
                self._refuse_overflow(name, exact, dtype)
                error = 0.0
            # What the adapter leaves as it is, rounding leaves too. Counted in fp32, quicker than booleans are.
            changed = int(exact.ne_(wide).sum())
            kept = int(rounded.ne_(wide if dtype == W.dtype else W.to(dtype).float()).sum())
            made = _Portion(
                made.weights, max(made.error, error), made.changed + changed, made.vanished + changed - kept
            )
        return made

    def _refuse_overflow(self, name: str, exact: torch.Tensor, dtype: torch.dtype) -> None:
        """Refuse finite weights that would become infinite; a base that holds NaN itself is only noted."""
        largest = float(exact.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        if largest > torch.finfo(dtype).max:
            what = f"{name} holds {largest:g}, which {DTYPE_NAMES[dtype]} cannot hold"
            raise CheckpointError(what, self.checkpoint.path, "choose another --dtype")
        if name not in self.not_finite:
            self.not_finite.append(name)


def _stored_report(manifest: Manifest, output: Path) -> MergeReport:
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
