"""The training loop: updates, validation, checkpoints, epochs, early stopping, the summary of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.devices import gpu_facts
from llamatune.durable_writing import write_atomic
from llamatune.errors import CheckpointError, NumericsError, Stopped
from llamatune.events import CheckpointSaved, EvalDone, Notice, OnEvent, ShouldStop, StepDone, StepSkipped
from llamatune.formats.metrics import LayerGradNorms, read_metrics
from llamatune.inference.evaluate import held_out_loss
from llamatune.ranks import ALONE, Ranks
from llamatune.spec import RunSpec
from llamatune.strict_json import dump_json
from llamatune.training.early_stopping import out_of_patience
from llamatune.training.gpu_meter import GpuMeter
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.rank_meter import RankMeter
from llamatune.training.run_card import run_companions
from llamatune.training.run_directory import RunDirectory, prune_checkpoints
from llamatune.training.run_file_names import METRICS, SUMMARY
from llamatune.training.run_memory import held_memory, peak_memory_bytes, peak_reserved_bytes
from llamatune.training.save_and_resume import RunOutput
from llamatune.training.schedule import Schedule, learning_rate_at
from llamatune.training.spec_changes import LEAST_GAIN
from llamatune.training.trainer_state import TrainerState
from llamatune.training.training_step import make_update

_SLOW_SAVE_S = 10.0


@dataclass
class TrainingLoop:
    """One run, from its last checkpoint to its end; every variant is a value of the spec.

    ``run`` is the claimed directory that metrics and checkpoints go to. ``should_stop`` is asked between windows and
    during evaluation; then one checkpoint is saved and ``Stopped`` raised. Several ranks learn in the messages of an
    update that one of them was asked. ``memory_facts`` go into the summary.
    """

    spec: RunSpec
    inputs: Inputs
    schedule: Schedule
    learner: Learner
    run: RunDirectory
    on_event: OnEvent
    should_stop: ShouldStop
    memory_facts: Mapping[str, Any]
    gpu_meter: GpuMeter
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        companions = run_companions(self.spec, self.inputs, self.on_event)
        self.output = RunOutput(self.spec, self.inputs, self.learner, self.run, self.ranks, self.gpu_meter, companions)
        self._stop_agreed, self._meter = False, RankMeter()
        self.progress = TrainerState()
        self._last_checkpoint: Path | None = None
        self._first_update = True  # of this process

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        checkpoint = self.output.load_checkpoint(self._warn)
        if checkpoint is None:
            self.output.cut_log(0)
            return
        path, self.progress, metrics_bytes = checkpoint
        if self._closed_windows() > self.progress.window and not self._finished():
            raise CheckpointError(
                "an earlier version ended the run inside an epoch and cannot go on with that",
                path,
                "choose another training.output_dir",
            )
        self.output.cut_log(metrics_bytes)
        self.ranks.wait()
        if LEAST_GAIN in self.run.changed_fields:
            losses = [evaluation.loss for evaluation in read_metrics(self.run.path / METRICS).evaluations]
            self.progress.recount_patience(losses, self.spec.evaluation.early_stopping_min_delta)
        self._last_checkpoint = path
        self._prune(path)

    def execute(self) -> dict[str, Any]:
        """Train to the end; the summary of the run."""
        self._clock = time.monotonic() - self.progress.elapsed_s
        while True:
            self._between_windows()
            if self._finished():
                break
            if self._stop_agreed or (self.ranks.size == 1 and self.should_stop()):
                self._stop()
            self._update()
        if self.progress.step == 0:
            raise self._numerics_fault("no window made an update: every gradient overflowed fp16")
        self.output.write_final(self.progress)
        summary = self._summary(time.monotonic() - self._clock)
        if self.ranks.is_first:
            write_atomic(self.run.path / SUMMARY, dump_json(summary))
        self.ranks.wait()
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

    def _report(self, event: StepDone | StepSkipped) -> None:
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
                self.on_event(done)

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
        return self.progress.window >= self.schedule.num_epochs * self.schedule.windows_per_epoch

    def _evaluate(self) -> None:
        """Compute the validation loss; write ``best/`` if it is the lowest."""
        progress, validation, started = self.progress, self.inputs.validation, time.monotonic()
        assert validation is not None
        model, autocast, rows = self.learner.model, self.learner.autocast, self.spec.training.micro_batch_size
        idle = self.learner.idle_forward
        try:
            result = held_out_loss(model, validation, rows, autocast, self.on_event, self.should_stop, self.ranks, idle)
        except Stopped:
            self._stop()
        if not math.isfinite(result.loss):
            raise self._numerics_fault("the validation loss is not finite")
        done = EvalDone(
            step=progress.step,
            loss=result.loss,
            perplexity=result.perplexity,
            best=progress.best_eval_loss is None or result.loss < progress.best_eval_loss,
            epoch=progress.window / self.schedule.windows_per_epoch,
            rows=len(validation),
            target_tokens=result.target_tokens,
            seconds=time.monotonic() - started,
        )
        self.output.log(done)
        if done.best:
            self.output.write_best(done)
        progress.note_evaluation(done, self.spec.evaluation.early_stopping_min_delta)
        self.on_event(done)

    def _save(self) -> None:
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
            self._save()
        where = f"step {self.progress.step} of {self.schedule.total_steps}"
        raise Stopped(f"stopped by a signal after {where}", self.run.path, "run the same command again to continue")

    def _warn(self, line: str) -> None:
        self.on_event(Notice(line, "warning"))

    def _numerics_fault(self, what: str, rows: object = None) -> NumericsError:
        among = f", among {rows}" if rows else ""
        training, step = self.spec.training, self.progress.step + 1
        last = f"the last good checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "nothing was saved"
        return NumericsError(
            f"{what} at step {step}{among} ({self.spec.model.dtype} weights, {training.precision})",
            self.run.path,
            f"{last}; lower training.learning_rate or set training.precision: fp32",
        )

    def _summary(self, runtime_s: float) -> dict[str, Any]:
        progress, count, device = self.progress, self.inputs.count, self.learner.device
        if stopped_early := not self._out_of_work():
            steps = f"step {progress.step} of {self.schedule.total_steps}"
            why = f"no lower validation loss in {progress.evaluations_without_improvement} evaluations"
            lowest = f"the lowest was {progress.best_eval_loss:.4f} at step {progress.best_step}"
            remedy = "with a larger evaluation.early_stopping_patience the same command goes on"
            self.on_event(Notice(f"stopped early after {steps}: {why}, {lowest}; {remedy}"))
        return {
            "steps": progress.step,
            "train_loss": progress.epochs[-1]["train_loss"] if progress.epochs else None,
            "best_eval_loss": progress.best_eval_loss,
            "best_step": progress.best_step,
            "trainable_parameters": count.trainable_parameters,
            "total_parameters": count.total_parameters,
            "trainable_percent": round(count.trainable_percent, 4),
            "peak_memory_bytes": peak_memory_bytes(device),
            "peak_reserved_bytes": peak_reserved_bytes(device),
            "device": str(device),
            "gpu": gpu_facts(device),
            **self.gpu_meter.facts(self.ranks),
            "runtime_s": runtime_s,
            "tokens_per_second": progress.tokens / max(progress.training_s, 1e-9),
            "epochs": progress.epochs,
            "skipped_windows": progress.skipped_windows,
            "stopped_early": stopped_early,
            "output_dir": str(self.run.path),
            **self._meter.facts(self.ranks, device),
            **self.memory_facts,
        }
