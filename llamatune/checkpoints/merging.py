"""Merges adapters into their base: in fp32, rounded once, with a report of the rounding errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter import Adapter, check_adapter
from llamatune.checkpoints.adapter_sum import facts_of, load_adapters, template_holder, weighted_sum
from llamatune.checkpoints.companion_files import complete_merged
from llamatune.checkpoints.config_json import EMBEDDING
from llamatune.checkpoints.dequantized_base import DequantizedBase
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.huggingface_files import files_of
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.merged_weights import MergedWeights
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.checkpoints.model_directory import warn_of_missing_head
from llamatune.command_options.inference import MergeOptions
from llamatune.data.template_choice import load_template
from llamatune.durable_writing import refuse_occupied, refuse_small_disk
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.formats.begun_files import BegunFile
from llamatune.formats.manifest import MANIFEST, Manifest, build_directory, finished_product, manifest_if_readable
from llamatune.model.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from llamatune.output_files import refuse_replacing
from llamatune.threads import using_threads
from llamatune.tokenizers.copied_files import replace_tokenizer
from llamatune.tokenizers.loading import load_tokenizer

_OTHER_BASE = (
    "it was trained on a base in {kind}, whose weights are not those that it is merged into: measure with --probe what "
    "that costs, or merge into the weights that training saw with --onto-quantized"
)


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
    probe_rows: int | None = None
    probe_base_loss: float | None = None
    probe_tuned_loss: float | None = None
    probe_merged_loss: float | None = None
    probe_gain_kept: float | None = None


Prove = Callable[[Path], Mapping[str, Any]]
"""Measures the merged model in a directory: the values of the report that begin with ``probe_``. It may refuse it."""


def merge_lora(
    options: MergeOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    prove: Prove | None = None,
    probe: str | None = None,
    begun: Mapping[str, BegunFile] | None = None,
) -> MergeReport:
    """Write the base with the adapters merged into it, as a model directory, all at once or not at all.

    Args:
        prove: asked before the directory gets its name.
        probe: the digest of what is measured then.
        begun: files of weights that are partly copied already.

    Raises:
        CheckpointError: the adapter does not belong to the base, or is already in it; a weight overflows the dtype.
        EnvironmentFault: the output is occupied, or the disk is too small.
        Stopped: ``should_stop`` said so; nothing is left behind.
    """
    assert options.probe is None or prove is not None, "merge_and_prove measures"
    checkpoint = open_checkpoint(options.model, on_event, options.variant)
    with using_threads(1):  # a second one for tensors this small waits in a busy loop, while files are copied
        adapters, weights = load_adapters(options.adapters), options.adapter_weights
        refuse_replacing(options.output, _files_given(options))
        base_fingerprint = fingerprint(checkpoint)
    format_ = checkpoint.format if options.format == "same" else options.format
    dtype = None if options.dtype == "same" else TORCH_DTYPES[options.dtype]
    adapter = weighted_sum(adapters, weights)
    alone = {"adapter_sha256": adapter.digest, "adapter_config": adapter.facts()}
    inputs: dict[str, Any] = {
        "base_fingerprint": base_fingerprint,
        **(alone if adapter is adapters[0] else {"adapters": facts_of(adapters, weights)}),
        "format": format_,
        "dtype": options.dtype,
    }
    asked = {"template": options.template, "probe": probe, "onto_quantized": options.onto_quantized}
    inputs |= {name: value for name, value in asked.items() if value}
    finished = finished_product(options.output, "merged", inputs)
    if finished is not None:
        return _stored_report(finished, options.output)
    refuse_occupied(options.output, options.overwrite)
    before = manifest_if_readable(options.model)
    template = _template(options, adapters, before, on_event)
    merged_before = before.merged_adapters if before else []
    for part in adapters:
        if part.digest in merged_before:
            raise CheckpointError(
                f"the adapter {part.path} is already merged into the model", options.model,
                "give the base it was trained on",
            )  # fmt: skip
    warn_of_missing_head(checkpoint.path, checkpoint.format, checkpoint.config, on_event)
    for part in adapters:
        check_adapter(part, checkpoint.config, base_fingerprint, options.force_base, on_event)
    quantized = quantization_of(adapters)
    if options.onto_quantized:
        if quantized is None:
            what = "not every adapter says that it was trained on a base in the same nf4, float8 or int8"
            raise SpecError(what, "--onto-quantized", "leave it out")
        checkpoint, dtype = DequantizedBase(checkpoint, quantized), dtype or torch.bfloat16
    for part in [] if options.onto_quantized else adapters:
        if part.base_dtype is not None:
            on_event(Notice(f"{part.path}: {_OTHER_BASE.format(kind=part.base_dtype)}", "warning"))
    checkpoint = adapter.on(checkpoint)
    needed = sum(
        math.prod(shape) * (dtype or checkpoint.dtype(name)).itemsize for name, shape in checkpoint.shapes.items()
    )
    refuse_small_disk(options.output, needed, "the merged model")

    order: Sequence[str] = list(checkpoint.shapes)
    if format_ == checkpoint.format == "hf":
        parts = {name: part for name, [part] in checkpoint.parts.items()}
        order = [name for file in files_of(parts) for name, _ in file]
    # Each thread merges a portion alone: portions are too small for torch to split one among all cores.
    threads = min(16, torch.get_num_threads())
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers,
        build_directory(options.output, "merged", inputs, options.overwrite) as staging,
    ):
        staging.begun = begun or {}
        merged = MergedWeights(checkpoint, adapter, dtype, workers, order, on_event, should_stop)
        if format_ == checkpoint.format:
            checkpoint.write_copy(staging, merged, dtype, on_event)
        else:
            write = write_huggingface if format_ == "hf" else write_meta
            write(staging, checkpoint.config, merged, merged.dtype_of, checkpoint.path, on_event)
        if (tokenizer := adapter.tokenizer_path) is not None:
            replace_tokenizer(tokenizer, staging.path, format_ == "meta", on_event)
        proof = {} if prove is None else prove(staging.path)
        report = MergeReport(
            output=str(options.output),
            format=format_,
            dtype=DTYPE_NAMES[merged.dtype_of(EMBEDDING)],
            tensors=len(checkpoint.shapes),
            merged_tensors=merged.merged_tensors + len(adapter.base_changes),
            max_abs_error=merged.max_abs_error,
            vanished_fraction=merged.vanished / merged.changed if merged.changed else 0.0,
            bytes=needed,
            **proof,
        )
        rounding = {"stored as": report.dtype, "fell back to the base's value": f"{report.vanished_fraction:.2%}"}
        complete_merged(staging.path, format_, options.model, adapters, template, rounding)
        staging.facts.update(
            adapters=[*merged_before, *(part.digest for part in adapters)],
            template=template,
            base_fingerprint=base_fingerprint,
            base_forced=any(part.base_fingerprint not in (None, base_fingerprint) for part in adapters),
            report=asdict(report),
        )
        if format_ == "meta":  # params.json has no key for it
            staging.facts["max_position_embeddings"] = checkpoint.config.max_position_embeddings
    if merged.not_finite:
        warning = f"{options.model}: {merged.not_finite[0]} holds NaN or infinity, and so does the copy"
        on_event(Notice(warning, "warning"))
    return report


def quantization_of(adapters: Sequence[Adapter]) -> str | None:
    """What the base was quantised to that all adapters were trained on; None where one does not say so."""
    said = {adapter.base_dtype for adapter in adapters}
    return said.pop() if len(said) == 1 else None


def _template(
    options: MergeOptions, adapters: Sequence[Adapter], before: Manifest | None, on_event: OnEvent
) -> dict[str, Any] | None:
    """The template to store: that of ``--template``, of the adapters, or of the base where they have none."""
    if options.template is not None:
        if options.template == "none":
            return None
        return load_template(options.template, load_tokenizer(options.model), on_event).to_dict()
    stored = template_holder(adapters).template
    return before.template if stored is None and before is not None else stored


def _stored_report(manifest: Manifest, output: Path) -> MergeReport:
    try:
        report = dict(manifest.facts["report"])
        known = {field.name: report[field.name] for field in fields(MergeReport) if field.default is MISSING}
        known |= {field.name: report[field.name] for field in fields(MergeReport) if field.name in report}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("its manifest holds no report", output / MANIFEST, "choose another output") from None
    return MergeReport(**{**known, "output": str(output), "already_done": True})


def _files_given(options: MergeOptions) -> list[tuple[str, Path]]:
    """What is read, by its option. A probe and a template may be names."""
    given = [("--model", options.model), *(("--adapter", path) for path in options.adapters)]
    if options.probe is not None and options.probe.exists():
        given.append(("--probe", options.probe))
    if options.template is not None and Path(options.template).is_file():
        given.append(("--template", Path(options.template)))
    return given
