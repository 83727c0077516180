"""The loop: the only one. Variants are values of the spec."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llamatune import __version__
from llamatune.checkpoints.run_state import (
    checkpoint_path,
    list_checkpoints,
    newest_run_state,
    optimizer_tensors,
    restore_optimizer,
    save_run_state,
)
from llamatune.data.packing import epoch_rows
from llamatune.errors import CheckpointError, NumericsError, Stopped
from llamatune.events import (
    CheckpointSaved,
    EpochDone,
    EvalDone,
    Notice,
    OnEvent,
    Progress,
    RunStarted,
    ShouldStop,
    StepDone,
    StepSkipped,
)
from llamatune.inference.evaluate import held_out_loss, perplexity
from llamatune.spec import RunSpec
from llamatune.training.memory import peak_memory_bytes, peak_reserved_bytes
from llamatune.training.optimizer import learning_rate_at
from llamatune.training.position import Position
from llamatune.training.run_directory import BEST, RunDirectory, prune_checkpoints
from llamatune.training.setup import Inputs, Learner, Schedule, packing_budget
from llamatune.training.trained import TrainedWeights
from llamatune.training.window import (
    WindowGradient,
    accumulate_gradient,
    make_update,
    names_not_finite,
    names_without_gradient,
    skip_update,
)

_LOWEST_LOSS_SCALE = 1e-4


class TrainingLoop:
    """One run from its position to its end.

    Args:
        run: the claimed directory that metrics and checkpoints go to.
        on_event: told of each step, evaluation, epoch and checkpoint.
        should_stop: asked between windows and during evaluation; when it says so, one checkpoint is
            saved and ``Stopped`` raised.
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
    ) -> None:
        self.spec, self.inputs, self.schedule, self.learner = spec, inputs, schedule, learner
        self.weights, self.run, self.on_event, self.should_stop = weights, run, on_event, should_stop
        self.position = Position()
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self._last_checkpoint: Path | None = None
        self._clock = time.monotonic()

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        found = newest_run_state(self.run.checkpoints, lambda line: self.on_event(Notice(line, "warning")))
        if found is None:
            self.run.cut_metrics(0)
            return
        progress, learner = found.progress, self.learner
        self.weights.restore(found.path)
        restore_optimizer(learner.optimizer, list(learner.parameters), found.optimizer)
        if progress["scaler"]:
            learner.scaler.load_state_dict(progress["scaler"])
        try:
            self.position = Position(**progress["position"])
        except TypeError as fault:
            raise CheckpointError(f"its position cannot be read: {fault}", found.path) from None
        if progress["torch"] != torch.__version__ or progress["threads"] != torch.get_num_threads():
            self.on_event(Notice("another torch version or thread count than before: not bit-exact", "warning"))
        self.run.cut_metrics(progress["metrics_bytes"])
        self._last_checkpoint = found.path
        if self.position.closed_epochs * self.schedule.windows_per_epoch > self.position.window:
            self.position.reopen_epoch()  # the run had ended inside it, and now goes on for longer

    def execute(self) -> dict[str, Any]:
        """Train to the end; the summary of the run."""
        self._announce()
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
        summary = self._summary()
        self.run.write_summary(summary)
        return summary

    def _announce(self) -> None:
        count, samples, rows = self.inputs.count, len(self.inputs.prepared.train), self.schedule.rows
        if self.spec.data.packing:
            per_step = samples / self.schedule.windows_per_epoch
            limit = self.spec.data.packed_tokens
            message = f"packing: {samples:,} samples in {rows:,} rows of at most {limit:,} tokens"
            self.on_event(Notice(f"{message}, about {per_step:,.1f} samples in each update"))
        self.on_event(
            RunStarted(
                count.trainable_parameters,
                count.total_parameters,
                len(self.inputs.prepared.train),
                0 if self.inputs.validation is None else len(self.inputs.validation),
                self.schedule.total_steps,
                self.schedule.num_epochs,
                self.position.step,
                str(self.learner.device),
            )
        )

    # Between windows: what is due here follows from the position alone, so a resumed run does it where it was left.

    def _at_epoch_end(self) -> bool:
        return self.position.window > 0 and self.position.window % self.schedule.windows_per_epoch == 0

    def _out_of_work(self) -> bool:
        if self.spec.training.max_steps is not None:
            return self.position.step >= self.spec.training.max_steps
        return self.position.window >= self.schedule.num_epochs * self.schedule.windows_per_epoch

    def _stopped_early(self) -> bool:
        patience = self.spec.evaluation.early_stopping_patience
        return patience is not None and self.position.evaluations_without_improvement >= patience

    def _finished(self) -> bool:
        return self._out_of_work() or self._stopped_early()

    def _settle(self) -> None:
        """Evaluate, close the epoch and save, each if it is due; never with a weight that is not finite."""
        position = self.position
        if self._save_due() or self._eval_due():
            broken = names_not_finite(self.learner)
            if broken:
                raise self._numerics_fault(f"the update made {broken[0]} infinite or NaN", ())
        if self.inputs.validation is not None and position.evaluated_step < position.step and self._eval_due():
            self._evaluate()
        if position.closed_epochs * self.schedule.windows_per_epoch < position.window and (
            self._at_epoch_end() or self._finished()
        ):
            self._close_epoch()
        if position.saved_window < position.window and self._save_due():
            self._save()

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
        position, validation = self.position, self.inputs.validation
        assert validation is not None
        try:
            result = held_out_loss(
                self.learner.model,
                validation,
                self.spec.training.micro_batch_size,
                self.learner.autocast,
                self.should_stop,
                lambda done, total: self.on_event(Progress("evaluating", done, total)),
            )
        except Stopped:
            self._stop()
        if not math.isfinite(result.loss):
            raise self._numerics_fault("the validation loss is not finite", ())
        best = position.best_eval_loss is None or result.loss < position.best_eval_loss
        if best:
            self.weights.write_best(self.run.path / BEST)
            position.best_eval_loss, position.best_step = result.loss, position.step
        position.evaluations_without_improvement = 0 if best else position.evaluations_without_improvement + 1
        position.evaluated_step = position.step
        self.run.record({"event": "eval", "step": position.step, "loss": result.loss, "perplexity": result.perplexity})
        self.on_event(EvalDone(position.step, result.loss, result.perplexity, best))

    def _close_epoch(self) -> None:
        position = self.position
        position.closed_epochs += 1
        if not position.epoch_target_tokens:
            return
        mean = position.epoch_loss / position.epoch_target_tokens
        elapsed = time.monotonic() - self._clock
        done = EpochDone(position.closed_epochs, self.schedule.num_epochs, mean, perplexity(mean), elapsed)
        position.epochs.append(
            {
                "epoch": done.epoch,
                "train_loss": mean,
                "train_perplexity": done.train_perplexity,
                "target_tokens": position.epoch_target_tokens,
            }
        )
        position.epoch_loss, position.epoch_target_tokens = 0.0, 0
        self.on_event(done)

    def _save(self) -> None:
        position, learner, started = self.position, self.learner, time.monotonic()
        position.saved_window, position.saved_step = position.window, position.step
        position.elapsed_s = started - self._clock
        path = checkpoint_path(self.run.checkpoints, position.step)
        save_run_state(
            path,
            self.weights.write_checkpoint,
            optimizer_tensors(learner.optimizer, list(learner.parameters)),
            {
                "step": position.step,
                "position": asdict(position),
                "scaler": learner.scaler.state_dict(),
                "metrics_bytes": self.run.sync_metrics(),
                "llamatune": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
        )
        self._last_checkpoint = path
        self.on_event(CheckpointSaved(position.step, str(path), time.monotonic() - started))
        prune_checkpoints(
            list_checkpoints(self.run.checkpoints),
            self.spec.training.keep_last,
            lambda line: self.on_event(Notice(line, "warning")),
        )

    def _stop(self) -> None:
        if self.position.saved_window < self.position.window:
            self._save()
        where = f"step {self.position.step} of {self.schedule.total_steps}"
        raise Stopped(f"stopped by a signal after {where}", self.run.path, "run the same command again to continue")

    # One window.

    def _window_rows(self) -> list[list[int]]:
        epoch, place = divmod(self.position.window, self.schedule.windows_per_epoch)
        if self._order[0] != epoch:
            lengths, spec = self.inputs.prepared.train.lengths, self.spec
            rows = epoch_rows(lengths, spec.training.seed, epoch, spec.data.shuffle, packing_budget(spec))
            self._order = (epoch, rows)
        start = place * self.schedule.rows_per_window
        return self._order[1][start : start + self.schedule.rows_per_window]

    def _consume_window(self) -> None:
        position, learner, training = self.position, self.learner, self.spec.training
        started, split, rows = time.monotonic(), self.inputs.prepared.train, self._window_rows()
        size = training.micro_batch_size
        chosen = [itertools.chain.from_iterable(rows[start : start + size]) for start in range(0, len(rows), size)]
        micro_batches = [split.batch(list(indices)) for indices in chosen]
        gradient = accumulate_gradient(learner, micro_batches, training.seed, position.window)
        if gradient.bad_rows:
            raise self._numerics_fault("the loss is not finite", gradient.bad_rows)
        if not gradient.is_finite:
            all_rows = tuple(row for batch in micro_batches for row in batch.rows)
            if not learner.scaler.is_enabled():
                raise self._numerics_fault("the gradient is not finite", all_rows)
            self._skip_window(all_rows)
            return
        if position.step == 0:
            without = names_without_gradient(learner)
            if without:
                raise self._numerics_fault(f"no gradient reached {without[0]} and {len(without) - 1} others", ())
        learning_rate = learning_rate_at(training, position.step, self.schedule.total_steps)
        make_update(learner, gradient, learning_rate, training.max_grad_norm)
        self._report_step(gradient, learning_rate, started)

    def _skip_window(self, rows: tuple[int, ...]) -> None:
        loss_scale = skip_update(self.learner)
        if loss_scale < _LOWEST_LOSS_SCALE:
            raise self._numerics_fault("the gradient overflows fp16 at any loss scale", rows)
        self.position.window += 1
        self.position.skipped_windows += 1
        self.run.record({"event": "skipped", "window": self.position.window, "loss_scale": loss_scale})
        self.on_event(StepSkipped(self.position.window, loss_scale))

    def _report_step(self, gradient: WindowGradient, learning_rate: float, started: float) -> None:
        position, now = self.position, time.monotonic()
        position.step += 1
        position.window += 1
        position.epoch_loss += gradient.loss * gradient.target_tokens
        position.epoch_target_tokens += gradient.target_tokens
        position.tokens += gradient.tokens
        position.training_s += now - started
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
        )
        values = asdict(done)
        del values["total_steps"], values["num_epochs"]
        self.run.record({"event": "step", **values})
        self.on_event(done)

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

    def _summary(self) -> dict[str, Any]:
        position, count = self.position, self.inputs.count
        runtime = time.monotonic() - self._clock
        return {
            "steps": position.step,
            "train_loss": position.epochs[-1]["train_loss"] if position.epochs else None,
            "best_eval_loss": position.best_eval_loss,
            "best_step": position.best_step,
            "trainable_parameters": count.trainable_parameters,
            "total_parameters": count.total_parameters,
            "trainable_percent": round(count.trainable_percent, 4),
            "peak_memory_bytes": peak_memory_bytes(self.learner.device),
            "peak_reserved_bytes": peak_reserved_bytes(self.learner.device),
            "device": str(self.learner.device),
            "runtime_s": runtime,
            "tokens_per_second": position.tokens / max(position.training_s, 1e-9),
            "epochs": position.epochs,
            "skipped_windows": position.skipped_windows,
            "stopped_early": self._stopped_early() and not self._out_of_work(),
            "output_dir": str(self.run.path),
        }
