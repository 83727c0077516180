"""One training run, from its spec to its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamatune.devices import capability_of, memory_faults
from llamatune.durable_writing import refuse_occupied, refuse_small_disk
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.formats.state_json import list_checkpoints
from llamatune.free_memory import held_host_bytes
from llamatune.memory.outlook import outlook
from llamatune.memory.remedies import after_running_out
from llamatune.model.compilable import compiling
from llamatune.spec import RunSpec
from llamatune.threads import suitable_threads
from llamatune.training.compiling import check_compiler, compile_ahead
from llamatune.training.loop import TrainingLoop
from llamatune.training.memory import plan_run_memory, report_plan
from llamatune.training.profiling import profiled
from llamatune.training.run_directory import claim_run_directory, finished_summary
from llamatune.training.run_files import CHECKPOINTS
from llamatune.training.setup import build_learner, micro_batch_tokens, open_inputs, plan_schedule
from llamatune.training.trained import trained_weights

_CHECKPOINT_BYTES = 12
"""Of a trained parameter, at most: itself and AdamW's two moments, each in fp32."""


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
            how = "stopped early" if summary.get("stopped_early") else "is finished"
            on_event(Notice(f"{spec.training.output_dir} {how}: nothing to do"))
            return summary
    needed = _CHECKPOINT_BYTES * inputs.count.trainable_parameters
    refuse_small_disk(Path(spec.training.output_dir), needed, "a checkpoint")
    if spec.training.compile:
        check_compiler(inputs.device)
    plan = plan_run_memory(spec, inputs.config, inputs.prepared.train, inputs.device)

    def what_helps() -> str:
        advice = after_running_out(spec, inputs.config, plan, capability_of(inputs.device))
        saved = list_checkpoints(Path(spec.training.output_dir) / CHECKPOINTS)
        return f"{advice}; the last checkpoint is {saved[0]}" if saved else advice

    claim = claim_run_directory(spec, inputs.digests, overwrite, resume, allowed_changes)
    threads = suitable_threads(inputs.config, micro_batch_tokens(spec, inputs.prepared.train))
    with claim as run, memory_faults(inputs.device, what_helps), threads:
        report_plan(plan, spec, inputs.config, inputs.device, on_event)
        memory_facts = {**plan.facts(), "memory_before_model_bytes": held_host_bytes().get("resident")}
        learner = build_learner(spec, inputs, on_event, should_stop, plan.levels)
        weights = trained_weights(spec, inputs, learner)
        profiling = profiled(spec.training.profile_steps, inputs.device, run.path, on_event)
        with compiling(spec.training.compile), profiling as on_event:
            if spec.training.compile:
                compile_ahead(spec, learner, inputs.prepared.train, on_event)
            loop = TrainingLoop(spec, inputs, schedule, learner, weights, run, on_event, should_stop, memory_facts)
            loop.resume()
            return loop.execute()


def plan_training(spec: RunSpec, *, force_base: bool = False, on_event: OnEvent = ignore_event) -> dict[str, Any]:
    """Check everything that a run needs and count what it would do; nothing is loaded, trained or written."""
    inputs = open_inputs(spec, force_base, on_event)
    schedule = plan_schedule(spec, inputs.prepared.train)
    output = Path(spec.training.output_dir)
    if not (output / "origin.json").is_file():
        refuse_occupied(output, overwrite=False)
    if spec.training.compile:
        check_compiler(inputs.device)
    facts = inputs.prepared.manifest.facts
    memory = plan_run_memory(spec, inputs.config, inputs.prepared.train, inputs.device)
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
        "memory_plan": outlook(spec, inputs.config, memory, capability_of(inputs.device)),
    }
