"""The training loop: updates, validation, checkpoints, epochs, early stopping, the summary of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.errors import CheckpointError, NumericsError, Stopped
from llamatune.events import CheckpointSaved, EpochDone, EvalDone, Notice, OnEvent, ShouldStop, StepDone, StepSkipped
from llamatune.formats.metrics import LayerGradNorms, Metrics, read_metrics
from llamatune.inference.evaluate import held_out_loss
from llamatune.ranks import ALONE, Ranks
from llamatune.spec import RunSpec
from llamatune.training.early_stopping import describe_stop, out_of_patience
from llamatune.training.gpu_meter import GpuMeter
from llamatune.training.input_digests import InputDigests
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.numerics_faults import numerics_fault
from llamatune.training.rank_meter import RankMeter
from llamatune.training.run_card import run_companions
from llamatune.training.run_directory import RunDirectory, prune_checkpoints
from llamatune.training.run_file_names import METRICS
from llamatune.training.run_memory import held_memory, peak_memory_bytes, peak_reserved_bytes
from llamatune.training.run_summary import early_stop_of, summary_of
from llamatune.training.save_and_resume import RunOutput
from llamatune.training.schedule import Schedule, learning_rate_at, rate_jump
from llamatune.training.spec_changes import LEAST_GAIN
from llamatune.training.trainer_state import TrainerState
from llamatune.training.training_step import make_update, name_rows

_SLOW_SAVE_S = 10.0


@dataclass
class TrainingLoop:
    """One run, from its last checkpoint to its end; every variant is a value of the spec.

    ``run`` is the claimed directory that metrics and checkpoints go to. ``should_stop`` is asked between windows and
    during evaluation; then one checkpoint is saved and ``Stopped`` raised. Several ranks learn in the messages of an
    update that one of them was asked. ``facts`` go into the summary.
    """

    spec: RunSpec
    inputs: Inputs
    schedule: Schedule
    learner: Learner
    run: RunDirectory
    on_event: OnEvent
    should_stop: ShouldStop
    facts: Mapping[str, Any]
    gpu_meter: GpuMeter
    input_digests: InputDigests
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        companions = run_companions(self.spec, self.inputs, self.on_event)
        parts = (self.learner, self.run, self.ranks, self.gpu_meter, self.input_digests, companions)
        self.output = RunOutput(self.spec, self.inputs, *parts)
        self._stop_agreed, self._first_update, self._meter = False, True, RankMeter()
        self.progress = TrainerState()
        self._last_checkpoint: Path | None = None

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        checkpoint = self.output.load_checkpoint(self._warn)
        if checkpoint is None:
            self.output.cut_log(0)
            return
        path, self.progress, saved = checkpoint
        since = self.progress.window - self._closed_windows()
        if since > self.schedule.windows_per_epoch or (since < 0 and not self._finished()):
            what = "an earlier version ended the run inside an epoch and cannot go on with that"
            what = what if since < 0 else f"closed_epochs is {self.progress.closed_epochs}, too few for its window"
            raise CheckpointError(what, path, "choose another training.output_dir")
        self.output.resume_log(saved)
        self.ranks.wait()
        if self.run.changed_fields:
            self._follow_changes(read_metrics(self.run.path / METRICS))
        self._last_checkpoint = path
        self._prune(path)

    def _follow_changes(self, logged: Metrics) -> None:
        """What fields of the spec that changed since the run began make of what was computed before."""
        if LEAST_GAIN in self.run.changed_fields:
            losses = [done.loss for done in logged.evaluations]
            self.progress.recount_patience(losses, self.spec.evaluation.early_stopping_min_delta)
        if jump := rate_jump(self.spec.training, logged.steps, self.schedule.total_steps):
            self._warn(jump)

    @property
    def evaluates_first(self) -> bool:
        """Whether the validation loss comes before the first step; a run that goes on has that behind it."""
        wanted = self.spec.evaluation.at_start and self.inputs.validation is not None
        return wanted and self._last_checkpoint is None

    def execute(self) -> dict[str, Any]:
        """Train to the end; the summary of the run."""
        self._clock = time.monotonic() - self.progress.elapsed_s
        if self.evaluates_first:
            self._evaluate()
        while True:
            self.input_digests.check()
            self._between_windows()
            if self._finished():
                break
            if self._stop_agreed or (self.ranks.size == 1 and self.should_stop()):
                self._stop()
            self._update()
        if self.progress.step == 0:
            raise self._numerics_fault("no window made an update: every gradient overflowed fp16")
        if not self.input_digests.settle(True, self.should_stop):
            self._stop()
        self.output.write_final(self.progress)
        self.output.write_summary(summary := self._summary(self._early_stop()))
        return summary

    def _update(self) -> None:
        """Train on the next accumulation window and report it."""
        progress, learner, training = self.progress, self.learner, self.spec.training
        started = time.monotonic()
        passes, lanes = self.schedule.passes(progress.window, self.run.passes), self.run.passes.lanes
        learning_rate = learning_rate_at(training, progress.step, self.schedule.total_steps)
        try:
            update = make_update(
                learner, passes, training, progress.window, learning_rate, self.should_stop, lanes, self.ranks
            )
        except Stopped:
            self._stop()  # resumed, the run computes this window from its beginning
        except NumericsError as fault:
            raise self._numerics_fault(fault.what, fault.where) from None
        self._stop_agreed, now = update.stop, time.monotonic()
        self._meter.add(update, now - started)
        if not update.made:
            progress.window += 1
            progress.skipped_windows += 1
            self._report(StepSkipped(progress.window, learner.scaler.scale))
            return
        progress.note_update(update, now - started)
        self._report(
            StepDone(
                step=progress.step,
                total_steps=self.schedule.total_steps,
                window=progress.window,
                epoch=progress.window / self.schedule.windows_per_epoch,
                num_epochs=self.schedule.num_epochs,
                loss=update.loss,
                learning_rate=learning_rate,
                grad_norm=update.grad_norm,
                loss_scale=update.loss_scale,
                target_tokens=update.target_tokens,
                tokens_per_second=update.tokens / max(now - started, 1e-9),
                peak_memory_bytes=peak_memory_bytes(learner.device),
                elapsed_s=now - self._clock,
                peak_reserved_bytes=peak_reserved_bytes(learner.device),
            )
        )
        if self._first_update:
            self._first_update = False
            self.on_event(held_memory(learner))
        if update.layer_grad_norms is not None:
            self.output.log(LayerGradNorms(progress.step, update.layer_grad_norms))

    def _report(self, event: StepDone | StepSkipped | EpochDone) -> None:
        self.output.log(event)
        self.on_event(event)

    # Between windows. What is due follows from the progress alone, so a resumed run does it where it was left.

    def _between_windows(self) -> None:
        """Evaluate, save and close the epoch, each if it is due; never with a weight that is not finite."""
        progress = self.progress
        if self._save_due() or self._eval_due():
            broken = [name for name, parameter in self.learner.parameters.items() if not is_finite(parameter)]
            if self.learner.sharded is not None:
                broken = [name for names in self.ranks.gather(broken) for name in names]
            if broken:
                raise self._numerics_fault(f"the update made {broken[0]} infinite or NaN")
        if self.inputs.validation is not None and progress.evaluated_step < progress.step and self._eval_due():
            self._evaluate()
        if progress.saved_window < progress.window and self._save_due():
            self._save()
        # After the save, so that a run which ended inside an epoch can go on with it.
        if self._closed_windows() < progress.window and (self._at_epoch_end() or self._finished()):
            done = progress.close_epoch(self.schedule.num_epochs, time.monotonic() - self._clock)
            if done is not None:
                self._report(done)

    def _eval_due(self) -> bool:
        every = self.spec.evaluation.every_steps
        due = self._at_epoch_end() if every is None else self.progress.step % every == 0
        return due or self._out_of_work()

    def _save_due(self) -> bool:
        every = self.spec.training.save_every_steps
        if every is None:
            return self._at_epoch_end() or self._finished()
        due = self.progress.step % every == 0 and self.progress.saved_step < self.progress.step
        return due or self._finished()

    def _at_epoch_end(self) -> bool:
        return self.progress.window > 0 and self.progress.window % self.schedule.windows_per_epoch == 0

    def _closed_windows(self) -> int:
        return self.progress.closed_epochs * self.schedule.windows_per_epoch

    def _finished(self) -> bool:
        patience = self.spec.evaluation.early_stopping_patience
        return self._out_of_work() or out_of_patience(self.progress.evaluations_without_improvement, patience)

    def _out_of_work(self) -> bool:
        if self.spec.training.max_steps is not None:
            return self.progress.step >= self.spec.training.max_steps
        return self.progress.window >= self.schedule.total_steps

    def _evaluate(self) -> None:
        """Compute the validation loss; write ``best/`` if it is the lowest of those after a step."""
        progress, validation, started = self.progress, self.inputs.validation, time.monotonic()
        assert validation is not None
        model, autocast, rows = self.learner.model, self.learner.autocast, self.spec.training.micro_batch_size
        idle = self.learner.idle_forward
        try:
            result = held_out_loss(model, validation, rows, autocast, self.on_event, self.should_stop, self.ranks, idle)
        except Stopped:
            self._stop()
        if not math.isfinite(result.loss):
            raise self._numerics_fault("the validation loss is not finite", f"validation {name_rows(result.broken)}")
        done = EvalDone(
            step=progress.step,
            loss=result.loss,
            perplexity=result.perplexity,
            best=progress.step > 0 and (progress.best_eval_loss is None or result.loss < progress.best_eval_loss),
            epoch=progress.window / self.schedule.windows_per_epoch,
            rows=len(validation),
            target_tokens=result.target_tokens,
            seconds=time.monotonic() - started,
        )
        self.output.log(done)
        if done.best:
            self.input_digests.settle(False, self.should_stop)
            self.output.write_best(done)
        progress.note_evaluation(done, self.spec.evaluation.early_stopping_min_delta)
        self.on_event(done)

    def _save(self, in_haste: bool = False) -> None:
        self.input_digests.settle(self._finished(), lambda: in_haste or self.should_stop())
        progress, started = self.progress, time.monotonic()
        progress.saved_window, progress.saved_step = progress.window, progress.step
        progress.elapsed_s = started - self._clock
        path = self.output.save_checkpoint(progress)
        self._last_checkpoint, seconds = path, time.monotonic() - started
        progress.open_epoch.checkpoint_s += seconds
        self.on_event(CheckpointSaved(progress.step, str(path), seconds))
        if seconds > _SLOW_SAVE_S:
            self._warn(f"saving took {seconds:.0f} s: a scheduler's signal must come a save and a step before the end")
        self._prune(path)

    def _prune(self, newest: Path) -> None:
        if self.ranks.is_first:
            prune_checkpoints(newest, self.spec.training.keep_last, self._warn)
        self.ranks.wait()

    def _stop(self) -> NoReturn:
        if self.progress.saved_window < self.progress.window:
            self._save(in_haste=True)
        where = f"step {self.progress.step} of {self.schedule.total_steps}"
        raise Stopped(f"stopped by a signal after {where}", self.run.path, "run the same command again to continue")

    def _warn(self, line: str) -> None:
        self.on_event(Notice(line, "warning"))

    def _numerics_fault(self, what: str, rows: object = None) -> NumericsError:
        return numerics_fault(what, rows, self.spec, self.progress.step, self.run.path, self._last_checkpoint)

    def _early_stop(self) -> dict[str, Any] | None:
        """Log and report that patience ended the run, and how it goes on; what the summary has of it."""
        if self._out_of_work():
            return None
        stop, least = early_stop_of(self.progress, self.output.epochs), self.spec.evaluation.early_stopping_min_delta
        message = describe_stop(stop, least, self.schedule.total_steps)
        self.output.log_durably(stop)
        self.on_event(Notice(message))
        return {**asdict(stop), "message": message}

    def _summary(self, early_stop: dict[str, Any] | None) -> dict[str, Any]:
        device, runtime_s = self.learner.device, time.monotonic() - self._clock
        use, at_start = self.gpu_meter.facts(self.ranks), self.output.loss_at_start()
        return {
            **summary_of(self.progress, self.output.epochs, self.inputs, device, use, at_start, runtime_s),
            "stopped_early": early_stop is not None,
            "early_stop": early_stop,
            "output_dir": str(self.run.path),
            **self._meter.facts(self.ranks, device),
            **self.facts,
        }
