"""Measures one benchmark cell: time, losses and peak of its training steps, then the memory categories."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.benchmarking.category_meter import CategoryMeter
from llamatune.data.batches import Batch
from llamatune.devices import capability_of, memory_size_bytes
from llamatune.errors import NumericsError
from llamatune.events import ignore_event, never_stop
from llamatune.inference.evaluate import held_out_loss
from llamatune.memory.plan import heaviest_rows, limit_of, plan_memory
from llamatune.model.compiled_functions import compiling
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.out_of_memory import memory_faults
from llamatune.shapes.gradient_lanes import LANES
from llamatune.spec import RunSpec, build_spec
from llamatune.strict_yaml import parse_yaml
from llamatune.threads import suitable_threads
from llamatune.training.compile_ahead import check_compiler, compile_ahead
from llamatune.training.determinism import deterministic_kernels
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.passes import PassRule
from llamatune.training.precision import fp32_products
from llamatune.training.run_memory import peak_memory_bytes, peak_reserved_bytes, plan_run_memory
from llamatune.training.schedule import Schedule, learning_rate_at, pass_tokens
from llamatune.training.training_step import Update, make_update

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Task:
    """What to measure: the first ``steps`` updates of a run of ``spec``, or (None) the whole run.

    The run is repeated for each of ``seeds``; time and memory are measured with the first.
    """

    spec: RunSpec
    steps: int | None
    seeds: tuple[int, ...]
    memory_limit_bytes: int | None

    def request(self) -> dict[str, Any]:
        """As JSON."""
        return {"kind": "steps", **vars(self), "spec": self.spec.to_yaml()}

    @classmethod
    def of_request(cls, request: dict[str, Any]) -> Task:
        """What ``request`` made."""
        spec = build_spec(parse_yaml(request["spec"], "the cell's spec"), "the cell's spec")
        return cls(spec, request["steps"], tuple(request["seeds"]), request["memory_limit_bytes"])


@dataclass(frozen=True)
class TimedSteps:
    """Seconds and tokens of each update, warm-up included; ``loss`` is that of the last update's window."""

    seconds: list[float]
    tokens: list[int]
    windows: int
    loss: float


class Trial:
    """A run with one seed.

    ``training.memory_limit: auto`` recomputes nothing here, so that a cell does not depend on what memory is free.
    """

    def __init__(self, spec: RunSpec, inputs: Inputs) -> None:
        train, levels = inputs.prepared.train, None
        if not isinstance(spec.training.learning_rate, float):  # nothing is searched here, equal work is timed
            spec = spec.with_learning_rate(spec.usual_learning_rate)
        self.spec, self.schedule, self.device = spec, Schedule(spec, train), inputs.device
        if spec.training.memory_limit != "auto":
            levels = plan_run_memory(spec, inputs.config, train, inputs.device).levels
        self.learner: Learner = build_learner(spec, inputs, ignore_event, never_stop, levels, drawn_on=inputs.device)
        if spec.training.compile:
            compile_ahead(spec, self.learner, train, ignore_event)
        tokens = spec.training.tokens_per_pass
        self.rule = PassRule(tokens if isinstance(tokens, int) else None, lanes=None if spec.adapter is None else LANES)

    def update(self, passes: list[Batch], window: int, step: int) -> Update:
        """Train on one window as the loop does; in fp16 it may overflow and make no update."""
        rate = learning_rate_at(self.spec.training, step, self.schedule.total_steps)
        try:
            return make_update(self.learner, passes, self.spec.training, window, rate, lanes=self.rule.lanes)
        except NumericsError:
            raise NumericsError("the loss or the gradient is not finite", f"window {window}") from None

    def run(self, steps: int | None, first: contextlib.AbstractContextManager[object]) -> TimedSteps:
        """Train for ``steps`` updates (None: to the end of the last epoch), the first window within ``first``."""
        seconds: list[float] = []
        tokens: list[int] = []
        window, last = 0, self.schedule.total_steps
        loss = float("nan")
        while len(seconds) < steps if steps is not None else window < last:
            started, passes = time.perf_counter(), self.schedule.passes(window, self.rule)
            with first if window == 0 else contextlib.nullcontext():
                update = self.update(passes, window, len(seconds))
            window += 1
            if update.made:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - started)
                tokens.append(update.tokens)
                loss = update.loss
        if not seconds:
            raise NumericsError("no window made an update: every gradient overflowed fp16")
        return TimedSteps(seconds, tokens, window, loss)

    def heaviest_windows(self) -> Iterator[list[Batch]]:
        """Windows of the heaviest rows of the data, whichever rows the steps saw.

        Their heaviest micro-batch comes first in one, and in the other last, with the gradient of all others in memory.
        """
        samples = self.schedule.heaviest_samples()
        for order in [samples, samples[::-1]] if len(samples) > 1 else [samples]:
            yield self.schedule.passes_of(order, self.rule)

    def repeat_heaviest(self, step: int) -> None:
        """Compute the heaviest windows as the steps were, for what the process and the allocator then hold."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        for passes in self.heaviest_windows():
            self.update(passes, 0, step)

    def measure_categories(self, step: int, limit_bytes: int | None) -> CategoryMeter:
        """The heaviest windows under a meter, uncompiled: it cannot see into compiled code."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        meter = self.meter(limit_bytes)
        for passes in self.heaviest_windows():
            meter.assign("temporary", (x for batch in passes for x in (batch.input_ids, batch.labels)))
            with compiling(False), meter:
                self.update(passes, 0, step)
            del passes  # before the next ones are made
        return meter

    def meter(self, limit_bytes: int | None) -> CategoryMeter:
        """A meter of live tensors; on CUDA the allocator gives the peak and enforces the limit."""
        if self.device.type == "cuda":
            return CategoryMeter(self.learner, lambda: torch.cuda.max_memory_allocated(self.device))
        return CategoryMeter(self.learner, limit_bytes=limit_bytes)


def measure(task: Task, inputs: Inputs) -> dict[str, Any]:
    """Time, memory and losses of a cell.

    Raises:
        OutOfMemory: on the device, on the host, or by ``memory_limit_bytes``, which limits what the allocator reserves
            on CUDA, and live tensors on a CPU (checked in the first window and in the heaviest ones).

    Memory is that of the heaviest rows of the data, of which a cell with short micro-batches sees few in its steps.
    """
    limit, device, train = task.memory_limit_bytes, inputs.device, inputs.prepared.train
    if limit is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / memory_size_bytes(device)), device.index)
    facts: dict[str, Any] = {}
    losses, held_out = [], []
    training = task.spec.training
    threads = suitable_threads(inputs.config, pass_tokens(task.spec, train))
    deterministic, products = deterministic_kernels(training.deterministic, device), fp32_products(training.precision)
    kernels = chosen_kernels(training.kernels, device)
    with deterministic, kernels, products, memory_faults(device, ""), compiling(training.compile), threads:
        if training.compile:
            check_compiler(device)
        for number, seed in enumerate(task.seeds):
            seeded = training.model_copy(update={"seed": seed})
            trial = Trial(task.spec.model_copy(update={"training": seeded}), inputs)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of what drawing the base took
            limited = number == 0 and limit is not None and device.type == "cpu"
            done = trial.run(task.steps, trial.meter(limit) if limited else contextlib.nullcontext())
            losses.append(done.loss)
            if inputs.validation is not None:
                size, autocast = training.micro_batch_size, trial.learner.autocast
                held_out.append(held_out_loss(trial.learner.model, inputs.validation, size, autocast).loss)
                if not math.isfinite(held_out[-1]):
                    raise NumericsError("the held-out loss is not finite")
            if number == 0:
                trial.repeat_heaviest(len(done.seconds))
                memory = _memory(device)
                categories = _categories(trial.measure_categories(len(done.seconds), limit), device)
                facts = {**_timing(done), **memory, **categories, "threads": torch.get_num_threads()}
            del trial
            gc.collect()  # before the next model is built: two may not fit
    rows = heaviest_rows(train.lengths, train.target_counts, task.spec)
    plan = plan_memory(task.spec, inputs.config, rows, capability_of(device), limit_of(task.spec, None))
    return {
        **facts,
        "predicted_bytes": plan.step.peak,
        "losses": losses,
        "held_out_losses": held_out,
        "trainable_parameters": inputs.count.trainable_parameters,
        "total_parameters": inputs.count.total_parameters,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _timing(done: TimedSteps) -> dict[str, Any]:
    warm_up = min(_WARM_UP_STEPS, len(done.seconds) // 3)
    seconds, tokens = done.seconds[warm_up:], done.tokens[warm_up:]
    return {
        "steps": len(done.seconds),
        "warm_up_steps": warm_up,
        "skipped_windows": done.windows - len(done.seconds),
        "step_s": statistics.median(seconds),
        "step_s_range": [min(seconds), max(seconds)],
        "runtime_s": sum(done.seconds),
        "tokens": sum(done.tokens),
        "tokens_per_second": sum(tokens) / sum(seconds),
    }


def _memory(device: torch.device) -> dict[str, Any]:
    """Memory of the heaviest windows. The allocator returns nothing to the device, so its use now is its peak."""
    cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if cuda else (0, 0)
    return {
        "allocated_bytes": peak_memory_bytes(device) if cuda else None,
        "reserved_bytes": peak_reserved_bytes(device),
        "device_bytes": total - free if cuda else None,
        "resident_bytes": resident_peak_bytes(),
    }


def _categories(meter: CategoryMeter, device: torch.device) -> dict[str, Any]:
    """Categories, and the rest of the peak: memory inside kernels, which only CUDA's allocator counts."""
    categories = meter.categories()
    if device.type == "cpu":
        return {"allocated_bytes": meter.peak_bytes, "categories": categories, "unattributed_bytes": 0}
    unattributed = torch.cuda.max_memory_allocated(device) - sum(categories.values())
    return {"categories": categories, "unattributed_bytes": unattributed}


def resident_peak_bytes() -> int:
    """The process's peak resident memory; that of ``getrusage`` would include the parent's before exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
