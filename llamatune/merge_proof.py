"""A merge that proves itself: the share of the tuned model's gain on a probe that the merged model keeps.

The gain is the loss of the base less that of the tuned model, the base with the adapter beside it. Both have the
weights that training saw, quantised or not. Activations are in fp32. One model after another is loaded.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter_sum import load_adapters, template_holder
from llamatune.checkpoints.merging import MergeReport, merge_lora, quantization_of
from llamatune.command_options.inference import LEAST_KEPT, MergeOptions, ModelSource
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.batches import Split, open_prepared
from llamatune.data.model_compatibility import check_rows, check_tokenizer
from llamatune.data.prepare import prepare_data
from llamatune.data.row_sources import pipes_kept, source_digest
from llamatune.data.saved_dataset import is_saved_dataset
from llamatune.data.templates import NOT_IN_FILES, TEMPLATES
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, NumericsError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.inference.evaluate import HeldOutLoss, RowScore, score_batch
from llamatune.inference.model_source import open_model
from llamatune.spec import load_stored_spec
from llamatune.strict_json import write_json
from llamatune.training.run_file_names import SPEC

RUN = Path("run")
"""As ``--probe``, where there is no such path: the rows that the adapter's run validated on."""
MOST_ROWS = 64
"""Of a probe that are used."""
_BATCH = 8


def merge_and_prove(
    options: MergeOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> MergeReport:
    """Merge, and with ``--probe`` measure the merged model before it gets its name.

    Raises:
        CheckpointError: it keeps less than ``--least-kept`` of the gain; nothing is written then.
        SpecError: no such rows. And what ``merge_lora`` raises.
    """
    if options.probe is None:
        return merge_lora(options, on_event, should_stop)
    with _probe(options, options.probe, on_event, should_stop) as (split, digest):
        prove = partial(_prove, options, split, on_event, should_stop)
        return merge_lora(options, on_event, should_stop, prove, digest)


@contextlib.contextmanager
def _probe(
    options: MergeOptions, probe: Path, on_event: OnEvent, should_stop: ShouldStop
) -> Iterator[tuple[Split, str]]:
    """The rows of the probe, and their digest."""
    of_run = probe == RUN and not probe.exists()
    directories = _rows_of_run(options) if of_run else (probe,)
    if of_run or (probe.is_dir() and not is_saved_dataset(probe)):
        prepared = open_prepared(*directories)
        check_tokenizer(prepared, options.model, options.force_base, on_event)
        validation = prepared.validation if prepared.validation is not None and len(prepared.validation) else None
        digest = prepared.digest
        yield validation or prepared.train, digest if isinstance(digest, str) else " ".join(digest)
        return
    with pipes_kept([probe], should_stop), tempfile.TemporaryDirectory() as scratch:
        digest = source_digest(probe)
        asked = None if options.template == "none" else options.template  # none is stored, but rows have one
        template = asked or _stored_template(options, Path(scratch))
        encoded = Path(scratch) / "prepared"
        prepared_as = PrepareOptions(
            [probe], options.model, encoded, template=template, validation_fraction=0, limit=MOST_ROWS
        )
        prepare_data(prepared_as, on_event, should_stop)
        yield open_prepared(encoded).train, digest


def _rows_of_run(options: MergeOptions) -> tuple[Path, ...]:
    """The prepared directories that the run of the first adapter validated on."""
    adapter, todo = options.adapters[0].resolve(), "give rows with --probe: a prepared directory, or a file"
    run = next((place for place in adapter.parents[:2] if (place / SPEC).is_file()), None)
    if run is None:
        raise SpecError("the adapter is in no run directory", adapter, todo)
    data = load_stored_spec(run / SPEC).data
    directories = data.validation_paths or data.train_paths
    for directory in directories:
        if not directory.is_dir():
            raise SpecError(f"the rows of the run are not at {directory}", run / SPEC, todo)
    if data.validation is None and not open_prepared(*directories).validation:
        raise SpecError("the run had no validation rows", directories[0], todo)
    return directories


def _stored_template(options: MergeOptions, scratch: Path) -> str | None:
    """The name or the file of the template that the adapters were trained with."""
    stored = template_holder(load_adapters(options.adapters)).template
    if stored is None:
        return None
    known = TEMPLATES.get(str(stored.get("name")))
    if known is not None and known.to_dict() == stored:
        return known.name
    if "chat_template" in stored:
        file = scratch / "template.jinja"
        with writing(file) as opened:
            opened.write(str(stored["chat_template"]).encode())
        return str(file)
    texts = {name: text for name, text in stored.items() if name not in NOT_IN_FILES}
    file = scratch / "template.yaml"
    write_json(file, texts)
    return str(file)


def _prove(
    options: MergeOptions, split: Split, on_event: OnEvent, should_stop: ShouldStop, merged: Path
) -> dict[str, Any]:
    """The report's values of the probe."""
    device, least = options.device or "auto", LEAST_KEPT if options.least_kept is None else options.least_kept
    quantized: Any = quantization_of(load_adapters(options.adapters)) or "same"
    beside = ModelSource(
        options.model,
        options.adapter,
        compare=True,
        force_base=options.force_base,
        dtype=quantized,
        device=device,
        weights=options.weights,
        variant=options.variant,
    )
    losses = _losses(beside, split, on_event, should_stop)
    base, tuned = losses["base_"], losses[""]
    found = _losses(ModelSource(merged, device=device), split, on_event, should_stop)[""]
    gain = base.loss - tuned.loss
    kept = (base.loss - found.loss) / gain if gain > 0 else None
    if kept is None:
        on_event(Notice("the tuned model gains nothing on the probe: no share of it can be kept", "warning"))
    elif kept < least:
        share = f"{kept:.4f} of the tuned model's gain on the probe, less than --least-kept {least:g}"
        todo = "merge with --dtype float32, or use base and adapter side by side"
        if quantized != "same" and not options.onto_quantized:
            todo = f"it was trained on a base in {quantized}: merge with --onto-quantized"
        raise CheckpointError(f"the merged model keeps {share}", options.output, todo)
    return {
        "probe_rows": min(len(split), MOST_ROWS),
        "probe_base_loss": base.loss,
        "probe_tuned_loss": tuned.loss,
        "probe_merged_loss": found.loss,
        "probe_gain_kept": kept,
    }


def _losses(source: ModelSource, split: Split, on_event: OnEvent, should_stop: ShouldStop) -> dict[str, HeldOutLoss]:
    """Of a model, and of the base as ``base_`` where the two are compared."""
    opened = open_model(source)
    check_rows(split, opened.config, f"--probe against {source.model}", on_event)
    rows = min(len(split), MOST_ROWS)
    tokens, weights = sum(split.lengths[:rows]), sum(map(math.prod, opened.checkpoint.shapes.values()))
    of = "base and tuned model" if source.compare else "the merged model"
    on_event(Notice(f"probing {of}: {tokens:,} tokens through {weights / 1e9:.2g} billion weights on {opened.device}"))
    found: dict[str, list[RowScore]] = {}
    with opened.computing(tokens * min(1.0, _BATCH / rows), "give fewer or shorter rows with --probe", on_event):
        for prefix, model in opened.load(ignore_event, should_stop).by_prefix.items():
            model.activation_dtype = torch.float32
            found[prefix] = []
            for batch in split.batches(_BATCH, rows):
                if should_stop():
                    raise Stopped("stopped while probing", source.model, "run the same command again")
                found[prefix] += score_batch(model, batch)
                on_event(Progress("probing", len(found[prefix]), rows))
    losses = {prefix: HeldOutLoss.of(scores) for prefix, scores in found.items()}
    if not all(math.isfinite(loss.loss) for loss in losses.values()):
        raise NumericsError("the loss on the probe is not finite", source.model)
    return losses
