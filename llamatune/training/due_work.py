"""What is due between two windows of a run: evaluation, checkpoint, end of an epoch, end of the run."""

from __future__ import annotations

from dataclasses import dataclass

from llamatune.spec import RunSpec
from llamatune.training.early_stopping import out_of_patience
from llamatune.training.schedule import Schedule
from llamatune.training.trainer_state import TrainerState


@dataclass(frozen=True)
class DueWork:
    """What the spec asks for at a place of the run. It follows from the progress alone, so a resumed run does the same.

    ``progress`` is that of the run, which changes it.
    """

    spec: RunSpec
    schedule: Schedule
    progress: TrainerState

    @property
    def evaluation(self) -> bool:
        every = self.spec.evaluation.every_steps
        due = self.epoch_end if every is None else self.progress.step % every == 0
        return due or self.out_of_work

    @property
    def save(self) -> bool:
        every = self.spec.training.save_every_steps
        if every is None:
            return self.epoch_end or self.finished
        due = self.progress.step % every == 0 and self.progress.saved_step < self.progress.step
        return due or self.finished

    @property
    def epoch_end(self) -> bool:
        return self.progress.window > 0 and self.progress.window % self.schedule.windows_per_epoch == 0

    @property
    def closed_windows(self) -> int:
        """The windows of the epochs that are closed."""
        return self.progress.closed_epochs * self.schedule.windows_per_epoch

    @property
    def finished(self) -> bool:
        patience = self.spec.evaluation.early_stopping_patience
        return self.out_of_work or out_of_patience(self.progress.evaluations_without_improvement, patience)

    @property
    def out_of_work(self) -> bool:
        if self.spec.training.max_steps is not None:
            return self.progress.step >= self.spec.training.max_steps
        return self.progress.window >= self.schedule.total_steps
