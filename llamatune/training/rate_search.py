"""Trials of learning rates before the first step: short trainings, after which the learner is as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamatune.data.batches import Batch
from llamatune.errors import NumericsError, Stopped
from llamatune.events import OnEvent, Progress, RateSearch, ShouldStop
from llamatune.formats.state_json import Scaler
from llamatune.inference.evaluate import score_batch
from llamatune.ranks import Ranks
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.numerics_faults import numerics_fault
from llamatune.training.rate_choice import BUDGET, HELD_OUT, MEASURED, UPDATES, choose_rate, prior_rate, run_factor
from llamatune.training.run_directory import RunDirectory
from llamatune.training.schedule import Schedule, learning_rate_at, warmup_steps
from llamatune.training.stopping import Stopping
from llamatune.training.training_step import Update, make_update, name_rows

_MOST_HALVINGS = 8
"""Micro-batches that may go into finding the loss scale of fp16."""
_SPARE_HALVINGS = 2
"""Of that scale, since gradients grow in a trial; an overflow then means that the weights have diverged."""


def search_learning_rate(
    spec: RunSpec,
    inputs: Inputs,
    schedule: Schedule,
    learner: Learner,
    run: RunDirectory,
    on_event: OnEvent,
    should_stop: ShouldStop,
    ranks: Ranks,
) -> RateSearch:
    """Try learning rates on the first micro-batches of the run, measure each on rows before it trains on them.

    Afterwards weights, optimizer, loss scale and generators are as they were. The result is a function of the spec, the
    data and the base, and the same on every rank.

    Raises:
        NumericsError: the loss or the gradient of the untrained weights is not finite.
        Stopped: ``should_stop`` asked for it; nothing is kept.
    """
    batches = list(_first_batches(inputs, schedule, UPDATES + HELD_OUT))
    kept = max(1, len(batches) - max(1, len(batches) * UPDATES // (UPDATES + HELD_OUT)))
    training, held_out = batches[: len(batches) - kept] or batches, batches[len(batches) - kept :]
    with _restored(learner) as untrained:
        about = (spec, schedule.total_steps, learner, untrained, training, held_out, run)
        trials = _Trials(*about, on_event, should_stop, ranks)
        start_loss = trials.start()
        prior = prior_rate(inputs.config.hidden_size, spec.lora is not None)
        factor = run_factor(schedule.total_steps, spec.training.gradient_accumulation_steps, len(training))
        most = (BUDGET - trials.spent) // (len(training) + len(held_out))
        choice = choose_rate(trials.loss_after, prior, spec.training.min_learning_rate, factor, most)
    rate = ranks.from_first(choice.rate)
    rates = sorted(trials.losses)
    losses = [trials.losses[one] for one in rates]
    return RateSearch(rate, choice.method, rates, losses, start_loss, len(training), trials.spent)


def _first_batches(inputs: Inputs, schedule: Schedule, count: int) -> Iterator[Batch]:
    """The first micro-batches of the first epoch, in the run's order."""
    for window in range(schedule.windows_per_epoch):
        for samples in schedule.samples(window):
            if not count:
                return
            count -= 1
            yield inputs.prepared.train.batch(samples)


@dataclass
class _Trials:
    """Trains from the untrained weights at one rate after another; ``spent`` micro-batches were computed."""

    spec: RunSpec
    total_steps: int
    learner: Learner
    untrained: Mapping[str, Tensor]
    training: Sequence[Batch]
    held_out: Sequence[Batch]
    run: RunDirectory
    on_event: OnEvent
    should_stop: ShouldStop
    ranks: Ranks
    spent: int = 0
    losses: dict[float, float | None] = field(default_factory=dict)

    def start(self) -> float:
        """The loss of the untrained weights; in fp16 the loss scale becomes one at which nothing overflows.

        The micro-batches are those of ``loss_after``.
        """
        measured = [*self.training[-MEASURED:], *self.held_out]
        loss = _mean([self._measure(batch) for batch in measured])
        if not math.isfinite(loss):
            raise self._fault("the loss is not finite", name_rows(row for batch in measured for row in batch.rows))
        scaler = self.learner.scaler
        if scaler.enabled:
            for _ in range(_MOST_HALVINGS):
                update = self._update(0, 0.0, untrained=True)
                if update is not None and update.made:
                    break
            for _ in range(_SPARE_HALVINGS):
                scaler.back_off()
        return loss

    def loss_after(self, rate: float) -> float | None:
        """The loss of a trial at ``rate``; None: it diverged.

        It is the mean over the target tokens of the last ``MEASURED`` micro-batches of training, each before the update
        on it, and of those that are held out, after the last update.
        """
        _restore(self.learner, self.untrained)
        schedule, count = self._compressed_schedule(rate), len(self.training)
        parts: list[tuple[float, int]] = []
        self.losses[rate] = None
        for step in range(count):
            update = self._update(step, learning_rate_at(schedule, step, count), untrained=step == 0)
            if update is None or not update.made:
                return None
            parts.append((update.loss * update.target_tokens, update.target_tokens))
        loss = _mean([*parts[-MEASURED:], *map(self._measure, self.held_out)])
        self.losses[rate] = loss if math.isfinite(loss) else None
        return self.losses[rate]

    def _compressed_schedule(self, rate: float) -> TrainingSection:
        """The run's schedule up to ``rate``, over as many steps as a trial has."""
        training, count = self.spec.training, len(self.training)
        warmup = round(warmup_steps(training, self.total_steps) * count / self.total_steps)
        lowest = min(training.min_learning_rate, rate)
        changes = {"learning_rate": rate, "warmup_steps": warmup, "warmup_ratio": None, "min_learning_rate": lowest}
        return training.model_copy(update=changes)

    def _update(self, index: int, rate: float, untrained: bool) -> Update | None:
        """Train on one micro-batch; None: a loss or gradient is not finite any more."""
        self._count()
        spec, lanes, stopping = self.spec.training, self.run.passes.lanes, Stopping(self.should_stop)
        try:
            update = make_update(self.learner, [self.training[index]], spec, index, rate, stopping, lanes, self.ranks)
        except NumericsError as fault:
            if untrained:
                raise self._fault(fault.what, fault.where) from None
            return None
        if update.stop:
            raise self._stopped()
        return update

    def _measure(self, batch: Batch) -> tuple[float, int]:
        """The summed loss of a micro-batch, without dropout and the same on every rank, and its target tokens."""
        self._count()
        model = self.learner.model
        model.eval()
        try:
            with self.learner.autocast():
                rows = score_batch(model, batch)
        finally:
            model.train()
        loss = math.fsum(row.summed_loss for row in rows)
        shared = self.ranks.from_first(loss if math.isfinite(loss) else None)
        return math.nan if shared is None else shared, sum(row.target_tokens for row in rows)

    def _count(self) -> None:
        if self.ranks.size == 1 and self.should_stop():
            raise self._stopped()
        self.spent += 1
        self.on_event(Progress("finding the learning rate", self.spent, BUDGET))

    def _stopped(self) -> Stopped:
        return Stopped("stopped while the learning rate was searched", self.run.path, "run the same command again")

    def _fault(self, what: str, where: object = None) -> NumericsError:
        return numerics_fault(what, where, self.spec, 0, self.run.path, None)


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """Of summed losses and their target tokens; NaN where one is not finite."""
    total = sum(loss for loss, _ in parts)  # fsum refuses infinities of both signs
    return total / sum(targets for _, targets in parts)


@contextlib.contextmanager
def _restored(learner: Learner) -> Iterator[Mapping[str, Tensor]]:
    """The weights as they are, in host memory. They, optimizer, loss scale and generators are given back in the end."""
    weights = {name: parameter.detach().cpu().clone() for name, parameter in learner.parameters.items()}
    scaler = Scaler.model_validate(learner.scaler.state())
    devices = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield weights
        finally:
            _restore(learner, weights)
            learner.scaler.restore(scaler)


@torch.no_grad()
def _restore(learner: Learner, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in learner.parameters.items():
        parameter.copy_(weights[name])
    learner.optimizer.zero_grad()
    learner.optimizer.state.clear()
