"""The training loop: updates, validation, checkpoints, epochs, early stopping, the summary of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.errors import CheckpointError, NumericsError, Stopped
from llamatune.events import CheckpointSaved, EpochDone, Notice, OnEvent, StepDone, StepSkipped
from llamatune.formats.metrics import LayerGradNorms, Metrics, read_metrics
from llamatune.ranks import ALONE, Ranks
from llamatune.spec import RunSpec
from llamatune.training.due_work import DueWork
from llamatune.training.early_stopping import describe_stop
from llamatune.training.evaluation import evaluate
from llamatune.training.gpu_meter import GpuMeter
from llamatune.training.input_digests import InputDigests
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.numerics_faults import numerics_fault
from llamatune.training.rank_meter import RankMeter
from llamatune.training.run_card import run_companions
from llamatune.training.run_directory import RunDirectory, prune_checkpoints
from llamatune.training.run_file_names import METRICS
from llamatune.training.run_memory import held_memory
from llamatune.training.run_prompts import RunPrompts
from llamatune.training.run_summary import early_stop_of, summary_of
from llamatune.training.save_and_resume import RunOutput
from llamatune.training.schedule import Schedule, learning_rate_at, rate_jump
from llamatune.training.spec_changes import LEAST_GAIN
from llamatune.training.step_event import step_done
from llamatune.training.stopping import Stopping
from llamatune.training.trainer_state import TrainerState
from llamatune.training.training_step import make_update

_SLOW_SAVE_S = 10.0


@dataclass
class TrainingLoop:
    """One run, from its last checkpoint to its end; every variant is a value of the spec.

    ``run`` is the claimed directory that metrics and checkpoints go to. ``stopping`` is asked between windows, inside
    of them, and around and during evaluation; then one checkpoint is saved and ``Stopped`` raised. Several ranks learn
    in the messages of an update that one of them says so. ``memory_facts`` go into the summary.
    """

    spec: RunSpec
    inputs: Inputs
    schedule: Schedule
    learner: Learner
    run: RunDirectory
    on_event: OnEvent
    stopping: Stopping
    memory_facts: Mapping[str, Any]
    gpu_meter: GpuMeter
    input_digests: InputDigests
    ranks: Ranks = ALONE
    prompts: RunPrompts | None = None

    def __post_init__(self) -> None:
        companions = run_companions(self.spec, self.inputs, self.on_event)
        parts = (self.learner, self.run, self.ranks, self.gpu_meter, self.input_digests, companions)
        self.output = RunOutput(self.spec, self.inputs, *parts)
        self._first_update, self._meter = True, RankMeter()
        self._stop_agreed: bool | None = None if self.ranks.size == 1 else False
        self._limit = self.stopping.limit
        self.progress = TrainerState()
        self._last_checkpoint: Path | None = None

    @property
    def due(self) -> DueWork:
        return DueWork(self.spec, self.schedule, self.progress)

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        checkpoint = self.output.load_checkpoint(self._warn)
        if checkpoint is None:
            self.output.cut_log(0)
            return
        path, self.progress, saved = checkpoint
        since = self.progress.window - self.due.closed_windows
        if since > self.schedule.windows_per_epoch or (since < 0 and not self.due.finished):
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
        """Whether an evaluation comes before the first step; a run that goes on has that behind it."""
        return self.spec.evaluation.at_start and self._evaluates and self._last_checkpoint is None

    @property
    def _evaluates(self) -> bool:
        return self.inputs.validation is not None or self.prompts is not None

    def execute(self) -> dict[str, Any]:
        """Train to the end; the summary of the run."""
        self._clock = time.monotonic() - self.progress.elapsed_s
        if self.evaluates_first:
            self._evaluate()
        while True:
            self.input_digests.check()
            self._between_windows()
            if self.due.finished:
                break
            self._stop_if(self.stopping.before_window, self._stop_agreed)
            try:
                with self._limit.measured(self._limit.steps):
                    self._update()
            except Stopped:  # this window is computed from its beginning, by this process or another
                self.learner.optimizer.zero_grad()
                self._stop_if(self.stopping.before_window, True)
        if self.progress.step == 0:
            raise self._numerics_fault("no window made an update: every gradient overflowed fp16")
        if not self.input_digests.settle(True, self.stopping.in_wait):
            self._stop()
        self._stop_if(self.stopping.before_result)
        self.output.write_final(self.progress)
        self.output.write_summary(summary := self._summary(self._early_stop()))
        return summary

    def _update(self) -> None:
        """Train on the next accumulation window and report it."""
        progress, learner, training = self.progress, self.learner, self.spec.training
        started = time.monotonic()
        self.stopping.begin_window()
        passes, lanes = self.schedule.passes(progress.window, self.run.passes), self.run.passes.lanes
        learning_rate = learning_rate_at(training, progress.step, self.schedule.total_steps)
        try:
            update = make_update(
                learner, passes, training, progress.window, learning_rate, self.stopping, lanes, self.ranks
            )
        except NumericsError as fault:
            raise self._numerics_fault(fault.what, fault.where) from None
        self.stopping.unsaved, now = True, time.monotonic()
        self._stop_agreed = None if self.ranks.size == 1 else update.stop
        self._meter.add(update, now - started)
        if not update.made:
            progress.window += 1
            progress.skipped_windows += 1
            self._report(StepSkipped(progress.window, learner.scaler.scale))
            return
        progress.note_update(update, now - started)
        seconds, elapsed_s = now - started, now - self._clock
        self._report(step_done(update, progress, self.schedule, learning_rate, learner.device, seconds, elapsed_s))
        if self._first_update:
            self._first_update = False
            self.on_event(held_memory(learner))
        if update.layer_grad_norms is not None:
            self.output.log(LayerGradNorms(progress.step, update.layer_grad_norms))

    def _report(self, event: StepDone | StepSkipped | EpochDone) -> None:
        self.output.log(event)
        self.on_event(event)

    def _between_windows(self) -> None:
        """Evaluate, save and close the epoch, each if it is due; never with a weight that is not finite."""
        progress = self.progress
        if self.due.save or self.due.evaluation:
            broken = [name for name, parameter in self.learner.parameters.items() if not is_finite(parameter)]
            if self.learner.sharded is not None:
                broken = [name for names in self.ranks.gather(broken) for name in names]
            if broken:
                raise self._numerics_fault(f"the update made {broken[0]} infinite or NaN")
        if self._evaluates and progress.evaluated_step < progress.step and self.due.evaluation:
            self._evaluate()
        if progress.saved_window < progress.window and self.due.save:
            self._save()
        # After the save, so that a run which ended inside an epoch can go on with it.
        if self.due.closed_windows < progress.window and (self.due.epoch_end or self.due.finished):
            done = progress.close_epoch(self.schedule.num_epochs, time.monotonic() - self._clock)
            if done is not None:
                self._report(done)

    def _evaluate(self) -> None:
        """Compute the validation loss and answer the prompts; write ``best/`` if the loss is the lowest so far."""
        self._stop_if(self.stopping.before_evaluation)
        while True:
            try:
                self.stopping.begin_evaluation()
                with self._limit.measured(self._limit.evaluations):
                    self._compute_evaluation()
                break
            except Stopped:
                self._stop_if(self.stopping.before_evaluation, True)
        self._stop_agreed = None

    def _compute_evaluation(self) -> None:
        progress, done, answers = self.progress, None, None
        asked = (self.stopping.in_evaluation, self.on_event, self.ranks)
        if self.inputs.validation is not None:
            batch_size = self.spec.training.micro_batch_size
            try:
                done = evaluate(self.learner, self.inputs.validation, progress, self.schedule, batch_size, *asked)
            except NumericsError as fault:
                raise self._numerics_fault(fault.what, fault.where) from None
        if self.prompts is not None:
            answers = self.prompts.answer(self.learner, progress.step, *asked)
        if done is not None:
            self.output.log(done)
        for answer in () if answers is None else answers.answers:
            self.output.log(answer)
        if done is not None:
            if done.best:
                self.input_digests.settle(False, self.stopping.in_wait)
                self.output.write_best(done)
            progress.note_evaluation(done, self.spec.evaluation.early_stopping_min_delta)
            self.on_event(done)
        if answers is not None:
            progress.note_answers(answers.seconds)
            self.on_event(answers)

    def _save(self, in_haste: bool = False) -> None:
        self.input_digests.settle(self.due.finished, lambda: in_haste or self.stopping.in_wait())
        with self._limit.measured(self._limit.saves):
            self._write_checkpoint()
        self._stop_agreed, self.stopping.unsaved = None, False

    def _write_checkpoint(self) -> None:
        progress, started = self.progress, time.monotonic()
        progress.saved_window, progress.saved_step = progress.window, progress.step
        progress.elapsed_s = started - self._clock
        path = self.output.save_checkpoint(progress)
        self._last_checkpoint, seconds = path, time.monotonic() - started
        progress.open_epoch.checkpoint_s += seconds
        self.on_event(CheckpointSaved(progress.step, str(path), seconds))
        if seconds > _SLOW_SAVE_S and not self._limit.ends:
            self._warn(f"saving took {seconds:.0f} s: a scheduler's signal must come a save and a step before the end")
        self._prune(path)

    def _prune(self, newest: Path) -> None:
        if self.ranks.is_first:
            prune_checkpoints(newest, self.spec.training.keep_last, self._warn)
        self.ranks.wait()

    def _stop_if(self, is_due: Callable[[], bool], agreed: bool | None = None) -> None:
        """Save and stop where it is due on some rank; not if that saving took less time than was feared.

        ``agreed``: what the ranks found together; None: they ask each other.
        """
        if not (self.ranks.any(is_due()) if agreed is None else agreed):
            return
        if self.progress.saved_window < self.progress.window:
            self._save(in_haste=True)
            if not self.ranks.any(is_due()):
                return
        self._stop()

    def _stop(self) -> NoReturn:
        if self.progress.saved_window < self.progress.window:
            self._save(in_haste=True)
        where = f"step {self.progress.step} of {self.schedule.total_steps}"
        raise self.stopping.stopped(where, self.run.path, self._first_update, self.ranks)

    def _warn(self, line: str) -> None:
        self.on_event(Notice(line, "warning"))

    def _numerics_fault(self, what: str, rows: object = None) -> NumericsError:
        return numerics_fault(what, rows, self.spec, self.progress.step, self.run.path, self._last_checkpoint)

    def _early_stop(self) -> dict[str, Any] | None:
        """Log and report that patience ended the run, and how it goes on; what the summary has of it."""
        if self.due.out_of_work:
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
            **self.memory_facts,
        }
