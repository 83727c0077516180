"""One training run, from its spec to its summary: checks, memory plan, run directory, learner, loop."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from llamatune.checkpoints.broken_weights import with_broken_tensor
from llamatune.devices import capability_of, gpu_facts
from llamatune.durable_writing import refuse_small_disk
from llamatune.errors import NumericsError
from llamatune.events import Notice, OnEvent, RunStarted, ShouldStop, ignore_event, never_stop
from llamatune.formats.background_digests import BackgroundDigests
from llamatune.formats.state_json import list_checkpoints
from llamatune.host_memory import held_host_bytes
from llamatune.memory.plan import with_kernels
from llamatune.memory.plan_report import plan_report
from llamatune.memory.remedies import after_running_out
from llamatune.model.compiled_functions import compiling
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.out_of_memory import memory_faults
from llamatune.ranks import ALONE, Ranks
from llamatune.slurm_job_end import Clock
from llamatune.spec import RunSpec
from llamatune.threads import suitable_threads
from llamatune.training.compile_ahead import check_compiler, compile_ahead
from llamatune.training.determinism import cublas_workspace, deterministic_kernels
from llamatune.training.early_stopping import told_stop
from llamatune.training.gpu_meter import metered_gpu
from llamatune.training.input_digests import DigestFiles, digesting
from llamatune.training.inputs import Inputs, open_inputs
from llamatune.training.loop import TrainingLoop
from llamatune.training.model_and_optimizer import LoadBase, build_learner
from llamatune.training.passes import PassRule
from llamatune.training.precision import fp32_products, report_slower_settings
from llamatune.training.profiling import profiled
from llamatune.training.run_directory import (
    claim_run_directory,
    finished_summary,
    prune_finished,
    refuse_output,
    share_run,
)
from llamatune.training.run_file_names import CHECKPOINTS
from llamatune.training.run_learning_rate import rate_facts, with_found_rate, with_given_rate
from llamatune.training.run_memory import choose_passes, choose_run_placement, plan_run_memory, report_plan
from llamatune.training.run_prompts import open_run_prompts
from llamatune.training.schedule import Schedule, pass_tokens
from llamatune.training.stopping import Stopping
from llamatune.training.time_limit import time_limit

_STATE_BYTES = 8
"""Per trained parameter, at most: AdamW's two fp32 moments."""


def train(
    spec: RunSpec,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force_base: bool = False,
    allowed_changes: tuple[str, ...] = (),
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
    clock: Clock | None = None,
    began_s: float | None = None,
    load_base: LoadBase | None = None,
    digest: DigestFiles = BackgroundDigests,
) -> dict[str, Any]:
    """Train as ``spec`` says, or continue the same run from its output directory; the summary, on every rank.

    The run stops before the end of its Slurm job, and before it has run for ``training.max_time`` since ``began_s`` of
    the monotonic ``clock`` (None: since now). ``load_base`` is for runs that share a base (``build_learner``), and
    ``digest`` for those that share its digests.

    Raises:
        LlamatuneError: what the user can cause; nothing is left half-written.
        Stopped: ``should_stop`` asked for it, or its time is over; a checkpoint is saved.
    """
    clock = clock or Clock()
    began_s = clock.monotonic() if began_s is None else began_s
    on_event = on_event if ranks.is_first else ignore_event
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            refuse_output(spec, overwrite)
        spec = with_given_rate(spec, overwrite, ranks)
        stack.enter_context(cublas_workspace(spec.training.deterministic))
        inputs = open_inputs(spec, force_base, on_event, ranks)
        schedule = Schedule(spec, inputs.prepared.train)
        if resume and not overwrite:
            summary = finished_summary(spec, inputs.digests, allowed_changes) if ranks.is_first else None
            summary = ranks.from_first(summary)
            if summary is not None:
                how = "stopped early" if summary.get("stopped_early") else "is finished"
                why = told_stop(summary)
                on_event(Notice(f"{spec.training.output_dir} {how}: nothing to do" + (f" ({why})" if why else "")))
                if ranks.is_first:
                    prune_finished(spec, lambda line: on_event(Notice(line, "warning")))
                return summary
        prompts = open_run_prompts(spec, inputs, on_event, ranks)
        config, rows, device = inputs.config, inputs.prepared.train, inputs.device
        stack.enter_context(deterministic_kernels(spec.training.deterministic, device))
        stack.enter_context(fp32_products(spec.training.precision))
        output, count = Path(spec.training.output_dir), inputs.count
        written = max(count.trainable_parameters, count.total_parameters - count.base_parameters)  # in fp32
        needed = _STATE_BYTES * count.trainable_parameters + 4 * written
        stopping = Stopping(should_stop)
        if ranks.is_first:
            refuse_small_disk(output, needed, "a checkpoint")
            stopping.limit = time_limit(spec.training, needed, clock, began_s, on_event)
        kernels = stack.enter_context(chosen_kernels(spec.training.kernels, device, on_event))
        planned = with_kernels(spec, kernels)
        report_slower_settings(spec, device, on_event)
        if spec.training.compile:
            check_compiler(device)

        def what_helps() -> str:
            advice = after_running_out(placed, config, plan, capability_of(device))
            saved = list_checkpoints(output / CHECKPOINTS)
            return f"{advice}; the last checkpoint is {saved[0]}" if saved else advice

        def passes() -> PassRule:
            return choose_passes(planned, config, rows, device, ranks.size)

        gpu = gpu_facts(device)
        claim = claim_run_directory(spec, inputs.digests, overwrite, resume, allowed_changes, passes, gpu)
        run = share_run(stack.enter_context(claim) if ranks.is_first else None, spec, ranks)
        placed = choose_run_placement(planned, config, rows, device, run.passes.tokens, ranks)
        plan = plan_run_memory(placed, config, rows, device, run.passes.tokens, ranks.size)
        stack.enter_context(memory_faults(device, what_helps))
        stack.enter_context(suitable_threads(config, pass_tokens(spec, rows, run.passes)))
        report_plan(plan, planned, placed, config, rows, device, on_event)
        before_bytes = held_host_bytes().get("resident")
        placement = placed.model.placement
        memory_facts = {"placement": placement, **plan.facts(), "memory_before_model_bytes": before_bytes}
        meter = stack.enter_context(metered_gpu(device))
        digests = stack.enter_context(digesting(spec, inputs, ranks, on_event, digest))
        learner = build_learner(placed, inputs, on_event, should_stop, plan.levels, ranks, load_base=load_base)
        profiled_steps = spec.training.profile_steps if ranks.is_first else None
        on_event = stack.enter_context(profiled(profiled_steps, device, run.path, on_event))
        stack.enter_context(compiling(spec.training.compile))
        if spec.training.compile:
            compile_ahead(spec, learner, rows, on_event)
        asked = (on_event, stopping)
        spec, run = with_found_rate(spec, inputs, schedule, learner, run, on_event, stopping, ranks)
        facts = {"learning_rate": spec.training.rate, **memory_facts}
        loop = TrainingLoop(spec, inputs, schedule, learner, run, *asked, facts, meter, digests, ranks, prompts)
        loop.resume()
        if run.rate_search is not None and not loop.progress.window:
            loop.output.log(run.rate_search)
        digests.start()
        _report_start(spec, inputs, schedule, loop, on_event)
        try:
            return loop.execute()
        except NumericsError as fault:
            if inputs.checkpoint is None:
                raise
            starting = () if inputs.starting_adapter is None else (inputs.starting_adapter,)
            raise with_broken_tensor(fault, inputs.checkpoint, starting) from None


def _report_start(spec: RunSpec, inputs: Inputs, schedule: Schedule, loop: TrainingLoop, on_event: OnEvent) -> None:
    """Report what will be trained, and from which step on."""
    samples, validation, count, progress = len(inputs.prepared.train), inputs.validation, inputs.count, loop.progress
    if spec.data.packing:
        per_step, limit = samples / schedule.windows_per_epoch, spec.data.packed_tokens
        message = f"packing: {samples:,} samples in {schedule.rows:,} rows of at most {limit:,} tokens"
        on_event(Notice(f"{message}, about {per_step:,.1f} samples in each update"))
    on_event(
        RunStarted(
            count.trainable_parameters, count.total_parameters, samples, 0 if validation is None else len(validation),
            schedule.total_steps, schedule.num_epochs, progress.step, str(inputs.device), progress.elapsed_s,
            loop.evaluates_first, tuple(loop.output.losses_before),
        )
    )  # fmt: skip


def _report_capacity(spec: RunSpec, inputs: Inputs, on_event: OnEvent) -> None:
    """Compare what there is to learn with what learns it.

    LoRA does well as long as it has at least as many parameters as there are target tokens (the LoRA primer of Tinker,
    by the authors of "LoRA Without Regret", Schulman et al. 2025).
    """
    if spec.lora is None:
        return
    targets, parameters = sum(inputs.prepared.train.target_counts), inputs.count.trainable_parameters
    what = f"{targets:,} target tokens an epoch, {parameters:,} trained parameters"
    if targets > parameters:
        todo = "with fewer parameters than target tokens LoRA may learn less than full fine-tuning"
        on_event(Notice(f"{what}: {todo}; raise lora.r, or set target_modules: all-linear", "warning"))
    else:
        on_event(Notice(f"{what}: the adapter is large enough for these rows"))


def plan_training(
    spec: RunSpec,
    *,
    overwrite: bool = False,
    force_base: bool = False,
    on_event: OnEvent = ignore_event,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Check everything that a run needs and count what it would do; nothing is loaded, trained or written."""
    refuse_output(spec, overwrite)
    spec = with_given_rate(spec, overwrite, ranks)
    inputs = open_inputs(spec, force_base, on_event, ranks)
    schedule = Schedule(spec, inputs.prepared.train)
    output = Path(spec.training.output_dir)
    config, rows, device = inputs.config, inputs.prepared.train, inputs.device
    report_slower_settings(spec, device, on_event)
    open_run_prompts(spec, inputs, on_event, ranks)
    _report_capacity(spec, inputs, on_event)
    with deterministic_kernels(spec.training.deterministic, device):
        if spec.training.compile:
            check_compiler(device)
        with chosen_kernels(spec.training.kernels, device, on_event) as kernels:
            planned = with_kernels(spec, kernels)
    rule = choose_passes(planned, config, rows, device, ranks.size)
    placed = choose_run_placement(planned, config, rows, device, rule.tokens, ranks)
    memory = plan_run_memory(placed, config, rows, device, rule.tokens, ranks.size)
    return {
        "trainable_parameters": inputs.count.trainable_parameters,
        "total_parameters": inputs.count.total_parameters,
        "trainable_percent": round(inputs.count.trainable_percent, 4),
        "train_rows": len(inputs.prepared.train),
        "validation_rows": 0 if inputs.validation is None else len(inputs.validation),
        "tokens_per_epoch": sum(inputs.prepared.train.lengths),
        "target_tokens_per_epoch": sum(inputs.prepared.train.target_counts),
        "windows_per_epoch": schedule.windows_per_epoch,
        "num_epochs": schedule.num_epochs,
        "total_steps": schedule.total_steps,
        **rate_facts(spec),
        **schedule.facts_of_passes(rule, ranks.size),
        "device": str(inputs.device),
        "output_dir": str(output),
        "memory_plan": plan_report(placed, inputs.config, memory, capability_of(inputs.device)),
    }
