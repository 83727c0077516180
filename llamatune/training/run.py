"""One training run, from its spec to its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamatune.devices import memory_faults
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.files import refuse_occupied
from llamatune.spec import RunSpec
from llamatune.training.loop import TrainingLoop
from llamatune.training.run_directory import claim_run_directory, finished_summary
from llamatune.training.setup import build_learner, open_inputs, plan_schedule
from llamatune.training.trained import trained_weights


def train(
    spec: RunSpec,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force_base: bool = False,
    allowed_changes: tuple[str, ...] = (),
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
) -> dict[str, Any]:
    """Train as ``spec`` says, continuing what its output directory holds of the same run; returns the summary.

    Raises:
        LlamatuneError: the member of the tree that tells what was wrong; nothing is left half-written.
        Stopped: ``should_stop`` said so; a checkpoint is saved.
    """
    inputs = open_inputs(spec, force_base, on_event)
    schedule = plan_schedule(spec, inputs.prepared.train)
    if resume and not overwrite:
        summary = finished_summary(spec, inputs.digests, allowed_changes)
        if summary is not None:
            on_event(Notice(f"{spec.training.output_dir} is finished: nothing to do"))
            return summary
    claim = claim_run_directory(spec, inputs.digests, overwrite, resume, allowed_changes)
    with claim as run, memory_faults(inputs.device):
        learner = build_learner(spec, inputs, on_event, should_stop)
        weights = trained_weights(spec, inputs, learner)
        loop = TrainingLoop(spec, inputs, schedule, learner, weights, run, on_event, should_stop)
        loop.resume()
        return loop.execute()


def plan_training(spec: RunSpec, *, force_base: bool = False, on_event: OnEvent = ignore_event) -> dict[str, Any]:
    """Check everything that a run needs and count what it would do; nothing is loaded, trained or written."""
    inputs = open_inputs(spec, force_base, on_event)
    schedule = plan_schedule(spec, inputs.prepared.train)
    output = Path(spec.training.output_dir)
    if not (output / "origin.json").is_file():
        refuse_occupied(output, overwrite=False)
    facts = inputs.prepared.facts
    return {
        "trainable_parameters": inputs.count.trainable_parameters,
        "total_parameters": inputs.count.total_parameters,
        "trainable_percent": round(inputs.count.trainable_percent, 4),
        "train_rows": len(inputs.prepared.train),
        "validation_rows": 0 if inputs.validation is None else len(inputs.validation),
        "tokens_per_epoch": facts.get("tokens"),
        "windows_per_epoch": schedule.windows_per_epoch,
        "num_epochs": schedule.num_epochs,
        "total_steps": schedule.total_steps,
        "device": str(inputs.device),
        "output_dir": str(output),
    }
