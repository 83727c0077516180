"""The loop: the only one. Variants are values of the spec."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from llamatune import __version__
from llamatune.checkpoints.run_state import newest_run_state, save_run_state
from llamatune.errors import CheckpointError, NumericsError, Stopped
from llamatune.events import (
    CheckpointSaved,
    MemoryHeld,
    Notice,
    OnEvent,
    ShouldStop,
    StepDone,
    StepSkipped,
)
from llamatune.formats.metrics import Evaluation, LayerGradNorms, Skipped, Step, read_metrics, record_of
from llamatune.formats.state_json import checkpoint_path
from llamatune.spec import RunSpec
from llamatune.training.memory import peak_memory_bytes, peak_reserved_bytes
from llamatune.training.optimizer import learning_rate_at
from llamatune.training.order import Windows
from llamatune.training.position import Position
from llamatune.training.run_directory import LEAST_GAIN, RunDirectory, prune_checkpoints
from llamatune.training.run_files import BEST
from llamatune.training.setup import Inputs, Learner, Schedule
from llamatune.training.summary import announce, early_stop, held_memory, summarise
from llamatune.training.trained import TrainedWeights
from llamatune.training.validation import note_evaluation, recount_patience, stops_early, validate
from llamatune.training.window import (
    LOWEST_LOSS_SCALE,
    WindowGradient,
    accumulate_gradient,
    layer_grad_norms,
    make_update,
    names_not_finite,
    names_without_gradient,
    skip_update,
)

_SLOW_SAVE_S = 10.0


def _machine() -> dict[str, Any]:
    """What rounding depends on beside the spec (float sums in other orders, by other instructions)."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu}


class TrainingLoop:
    """One run from its position to its end.

    Args:
        run: the claimed directory that metrics and checkpoints go to.
        on_event: told of each step, evaluation, epoch and checkpoint.
        should_stop: asked between windows and during evaluation; when it says so, one checkpoint is
            saved and ``Stopped`` raised.
        memory_facts: what was planned, for the summary to hold beside what was measured.
    """

    def __init__(
        self,
        spec: RunSpec,
        inputs: Inputs,
        schedule: Schedule,
        learner: Learner,
        weights: TrainedWeights,
        run: RunDirectory,
        on_event: OnEvent,
        should_stop: ShouldStop,
        memory_facts: Mapping[str, Any],
    ) -> None:
        self.memory_facts = memory_facts
        self.spec, self.inputs, self.schedule, self.learner = spec, inputs, schedule, learner
        self.weights, self.run, self.on_event, self.should_stop = weights, run, on_event, should_stop
        self.position = Position()
        self.windows = Windows(spec, inputs.prepared.train, schedule)
        self._last_checkpoint: Path | None = None
        self._memory: MemoryHeld | None = None
        self._clock = time.monotonic()

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        found = newest_run_state(self.run.checkpoints, self._warn)
        if found is None:
            self.run.log.cut(0)
            return
        progress, learner = found.progress, self.learner
        self.weights.restore(found.path)
        learner.optimizer.restore(found.optimizer, found.path)
        learner.scaler.restore(progress["scaler"])
        try:
            self.position = Position.restored(progress["position"])
        except (KeyError, TypeError) as fault:
            raise CheckpointError(f"its position cannot be read: {fault}", found.path) from None
        changed = [f"{name} was {progress[name]}" for name, now in _machine().items() if progress.get(name, now) != now]
        if changed:
            self._warn(f"not bit-exact on another machine than before: {', '.join(changed)}")
        closed_windows = self.position.closed_epochs * self.schedule.windows_per_epoch
        if closed_windows > self.position.window and not self._finished():
            raise CheckpointError(
                "an earlier version ended the run inside an epoch and cannot go on with that",
                found.path,
                "choose another training.output_dir",
            )
        self.run.log.cut(progress["metrics_bytes"])
        if LEAST_GAIN in self.run.changed_fields:
            evaluations = read_metrics(self.run.log.path).evaluations
            recount_patience(self.spec, self.position, [evaluation.loss for evaluation in evaluations])
        self._last_checkpoint = found.path
        self._prune(found.path)

    def execute(self) -> dict[str, Any]:
        """Train to the end; the summary of the run."""
        announce(self.spec, self.inputs, self.schedule, self.position, self.learner.device, self.on_event)
        self._clock = time.monotonic() - self.position.elapsed_s
        while True:
            self._settle()
            if self._finished():
                break
            if self.should_stop():
                self._stop()
            self._consume_window()
        if self.position.step == 0:
            raise self._numerics_fault("no window made an update: every gradient overflowed fp16", ())
        self.weights.write_final(self.run.path)
        stopped_early = stops_early(self.spec, self.position) and not self._out_of_work()
        if stopped_early:
            self.on_event(Notice(early_stop(self.position, self.schedule)))
        summary = summarise(
            self.inputs,
            self.position,
            self.learner.device,
            runtime_s=time.monotonic() - self._clock,
            stopped_early=stopped_early,
            output_dir=self.run.path,
        )
        summary |= self.memory_facts
        self.run.write_summary(summary)
        return summary

    # Between windows: what is due here follows from the position alone, so a resumed run does it where it was left.

    def _at_epoch_end(self) -> bool:
        return self.position.window > 0 and self.position.window % self.schedule.windows_per_epoch == 0

    def _out_of_work(self) -> bool:
        if self.spec.training.max_steps is not None:
            return self.position.step >= self.spec.training.max_steps
        return self.position.window >= self.schedule.num_epochs * self.schedule.windows_per_epoch

    def _finished(self) -> bool:
        return self._out_of_work() or stops_early(self.spec, self.position)

    def _settle(self) -> None:
        """Evaluate, close the epoch and save, each if it is due; never with a weight that is not finite."""
        position = self.position
        if self._save_due() or self._eval_due():
            broken = names_not_finite(self.learner)
            if broken:
                raise self._numerics_fault(f"the update made {broken[0]} infinite or NaN", ())
        if self.inputs.validation is not None and position.evaluated_step < position.step and self._eval_due():
            self._evaluate()
        if position.saved_window < position.window and self._save_due():
            self._save()
        # After the save, so that a run which ended inside an epoch can go on with it.
        if position.closed_epochs * self.schedule.windows_per_epoch < position.window and (
            self._at_epoch_end() or self._finished()
        ):
            self._close_epoch()

    def _eval_due(self) -> bool:
        every = self.spec.evaluation.every_steps
        due = self._at_epoch_end() if every is None else self.position.step % every == 0
        return due or self._out_of_work()

    def _save_due(self) -> bool:
        every = self.spec.training.save_every_steps
        if every is None:
            return self._at_epoch_end() or self._finished()
        due = self.position.step % every == 0 and self.position.saved_step < self.position.step
        return due or self._finished()

    def _evaluate(self) -> None:
        try:
            done = validate(
                self.spec, self.inputs, self.schedule, self.learner, self.position, self.should_stop, self.on_event
            )
        except Stopped:
            self._stop()
        if not math.isfinite(done.loss):
            raise self._numerics_fault("the validation loss is not finite", ())
        values = asdict(done)
        self.run.log.append(record_of(Evaluation, done))
        if values.pop("best"):
            del values["seconds"]  # what is written is a function of the run alone
            self.weights.write_best(self.run.path / BEST, values)
        note_evaluation(self.spec, self.position, done)
        self.on_event(done)

    def _close_epoch(self) -> None:
        done = self.position.close_epoch(self.schedule.num_epochs, time.monotonic() - self._clock)
        if done is not None:
            self.on_event(done)

    def _save(self) -> None:
        position, learner, started = self.position, self.learner, time.monotonic()
        position.saved_window, position.saved_step = position.window, position.step
        position.elapsed_s = started - self._clock
        path = checkpoint_path(self.run.checkpoints, position.step)
        save_run_state(
            path,
            self.weights.write_checkpoint,
            learner.optimizer.state_tensors(),
            {
                "step": position.step,
                "position": asdict(position),
                "scaler": learner.scaler.state(),
                "metrics_bytes": self.run.log.sync(),
                "llamatune": __version__,
                **_machine(),
            },
        )
        self._last_checkpoint, seconds = path, time.monotonic() - started
        position.open_epoch.checkpoint_s += seconds
        self.on_event(CheckpointSaved(position.step, str(path), seconds))
        if seconds > _SLOW_SAVE_S:
            self._warn(f"saving took {seconds:.0f} s: a scheduler's signal must come a save and a step before the end")
        self._prune(path)

    def _prune(self, newest: Path) -> None:
        prune_checkpoints(newest, self.spec.training.keep_last, self._warn)

    def _warn(self, line: str) -> None:
        self.on_event(Notice(line, "warning"))

    def _stop(self) -> NoReturn:
        if self.position.saved_window < self.position.window:
            self._save()
        where = f"step {self.position.step} of {self.schedule.total_steps}"
        raise Stopped(f"stopped by a signal after {where}", self.run.path, "run the same command again to continue")

    # One window.

    def _consume_window(self) -> None:
        position, learner, training = self.position, self.learner, self.spec.training
        started, micro_batches = time.monotonic(), self.windows.micro_batches(position.window)
        try:
            gradient = accumulate_gradient(learner, micro_batches, training.seed, position.window, self.should_stop)
        except Stopped:
            self._stop()  # the window begins anew when the run goes on
        if gradient.bad_rows:
            raise self._numerics_fault("the loss is not finite", gradient.bad_rows)
        if not gradient.is_finite:
            all_rows = tuple(row for batch in micro_batches for row in batch.rows)
            if not learner.scaler.enabled:
                raise self._numerics_fault("the gradient is not finite", all_rows)
            self._skip_window(all_rows)
            return
        if position.step == 0:
            without = names_without_gradient(learner)
            if without:
                raise self._numerics_fault(f"no gradient reached {without[0]} and {len(without) - 1} others", ())
        learning_rate = learning_rate_at(training, position.step, self.schedule.total_steps)
        norms = layer_grad_norms(learner) if training.log_layer_grad_norms else None
        make_update(learner, gradient, learning_rate, training.max_grad_norm)
        self._report_step(gradient, learning_rate, started)
        if norms is not None:
            self.run.log.append(LayerGradNorms(position.step, norms))

    def _skip_window(self, rows: tuple[int, ...]) -> None:
        loss_scale = skip_update(self.learner)
        if loss_scale < LOWEST_LOSS_SCALE:
            raise self._numerics_fault("the gradient overflows fp16 at any loss scale", rows)
        self.position.window += 1
        self.position.skipped_windows += 1
        self.run.log.append(Skipped(self.position.window, loss_scale))
        self.on_event(StepSkipped(self.position.window, loss_scale))

    def _report_step(self, gradient: WindowGradient, learning_rate: float, started: float) -> None:
        position, now = self.position, time.monotonic()
        position.note_step(gradient.loss, gradient.target_tokens, gradient.tokens, now - started)
        done = StepDone(
            step=position.step,
            total_steps=self.schedule.total_steps,
            window=position.window,
            epoch=position.window / self.schedule.windows_per_epoch,
            num_epochs=self.schedule.num_epochs,
            loss=gradient.loss,
            learning_rate=learning_rate,
            grad_norm=gradient.grad_norm,
            loss_scale=gradient.loss_scale,
            target_tokens=gradient.target_tokens,
            tokens_per_second=gradient.tokens / max(now - started, 1e-9),
            peak_memory_bytes=peak_memory_bytes(self.learner.device),
            elapsed_s=now - self._clock,
            peak_reserved_bytes=peak_reserved_bytes(self.learner.device),
        )
        self.run.log.append(record_of(Step, done))
        self.on_event(done)
        if self._memory is None:
            self._memory = held_memory(self.learner)
            self.on_event(self._memory)

    def _numerics_fault(self, what: str, rows: tuple[int, ...]) -> NumericsError:
        shown = ", ".join(map(str, sorted(rows)[:8])) + (" ..." if len(rows) > 8 else "")
        among = f", among rows {shown}" if rows else ""
        training, step = self.spec.training, self.position.step + 1
        last = f"the last good checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "nothing was saved"
        return NumericsError(
            f"{what} at step {step}{among} ({self.spec.model.dtype} weights, {training.precision})",
            self.run.path,
            f"{last}; lower training.learning_rate or set training.precision: fp32",
        )
