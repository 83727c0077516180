"""The schedule of a run: its accumulation windows and their rows, total steps, warm-up, learning rate of each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from llamatune.data.batches import Batch, Split
from llamatune.data.packing import epoch_rows
from llamatune.errors import SpecError
from llamatune.events import Step
from llamatune.shapes.gradient_lanes import count_lanes, deal_passes, own_lanes
from llamatune.spec import RunSpec
from llamatune.spec_sections import DEFAULT_EPOCHS, TrainingSection
from llamatune.training.passes import SINGLE_MICRO_BATCHES, PassRule, join_micro_batches

_WINDOWS_COUNTED = 1000
"""At most so many windows are looked at for the facts about passes."""


class Schedule:
    """How many accumulation windows an epoch has, which samples each of them trains on, and where the run ends.

    A row is one sample, or several packed ones. A window is a function of (seed, its number); the last one of an epoch
    may be partial. ``num_epochs`` is the spec's, or with ``max_steps`` the number of epochs begun; its last part is
    rounded up to whole windows. ``SpecError`` if the warm-up is longer than the run.
    """

    def __init__(self, spec: RunSpec, train: Split) -> None:
        self._spec, self._train, training = spec, train, spec.training
        self._lengths = train.lengths
        self._epoch, self._epoch_rows = 0, self.rows_of(0)
        self.rows = len(self._epoch_rows)
        self._rows_per_window = training.micro_batch_size * training.gradient_accumulation_steps
        self.windows_per_epoch = -(-self.rows // self._rows_per_window)
        if training.max_steps is not None:
            self.num_epochs: float = -(-training.max_steps // self.windows_per_epoch)
            self.total_steps = training.max_steps
        else:
            self.num_epochs = training.num_epochs or DEFAULT_EPOCHS
            # The decimal as it is written: the float 0.1 is above a tenth, and of 10 windows would take a second one.
            self.total_steps = math.ceil(Fraction(str(self.num_epochs)) * self.windows_per_epoch)
        warmup_steps(training, self.total_steps)

    def rows_of(self, epoch: int) -> list[list[int]]:
        """The indices of the samples of each row, in the order of an epoch."""
        data = self._spec.data
        budget = data.packed_tokens if data.packing else None
        return epoch_rows(self._lengths, self._spec.training.seed, epoch, data.shuffle, budget)

    def samples(self, window: int) -> list[list[int]]:
        """The indices of the samples of each micro-batch."""
        epoch, place = divmod(window, self.windows_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._epoch_rows = epoch, self.rows_of(epoch)
        rows = self._epoch_rows[place * self._rows_per_window :][: self._rows_per_window]
        return self._micro_batches(rows)

    def _micro_batches(self, rows: list[list[int]]) -> list[list[int]]:
        size = self._spec.training.micro_batch_size
        return [list(itertools.chain(*rows[start : start + size])) for start in range(0, len(rows), size)]

    def heaviest_samples(self) -> list[list[int]]:
        """``samples`` of a window that no run may have: the rows of the first epoch with most tokens, falling."""
        rows = sorted(self.rows_of(0), key=lambda row: -sum(self._lengths[i] for i in row))
        return self._micro_batches(rows[: self._rows_per_window])

    def passes(self, window: int, rule: PassRule = SINGLE_MICRO_BATCHES) -> list[Batch]:
        """The batches of the window's passes, in order."""
        return self.passes_of(self.samples(window), rule)

    def passes_of(self, samples: list[list[int]], rule: PassRule = SINGLE_MICRO_BATCHES) -> list[Batch]:
        """The batches of the passes of a window with these samples."""
        sizes = [sum(self._lengths[i] for i in indices) for indices in samples]
        joined = join_micro_batches(sizes, rule)
        return [self._train.batch([i for number in numbers for i in samples[number]]) for numbers in joined]

    def facts_of_passes(self, rule: PassRule, ranks: int) -> dict[str, Any]:
        """For JSON: how the first epoch's windows are computed; ``balance`` of ranks is mean over highest tokens."""
        passes, shares = 0, []
        for window in range(min(self.windows_per_epoch, _WINDOWS_COUNTED)):
            sizes = [sum(self._lengths[i] for i in indices) for indices in self.samples(window)]
            tokens = [sum(sizes[number] for number in numbers) for numbers in join_micro_batches(sizes, rule)]
            dealt = deal_passes(tokens, rule.lanes or count_lanes(ranks))
            loads = [
                sum(tokens[index] for lane in own_lanes(rank, ranks, len(dealt)) for index in dealt[lane])
                for rank in range(ranks)
            ]
            passes += len(tokens)
            shares.append(sum(loads) / (ranks * max(loads)))
        facts = {"tokens_per_pass": rule.tokens, "passes_per_window": round(passes / len(shares), 2)}
        return facts if ranks == 1 else {**facts, "ranks": ranks, "balance": round(math.fsum(shares) / len(shares), 4)}


def pass_tokens(spec: RunSpec, train: Split, rule: PassRule = SINGLE_MICRO_BATCHES) -> float:
    """Tokens of the average pass, without ``rule.tokens`` of a micro-batch; a packed row counts as full."""
    tokens, steps = sum(train.lengths), spec.training.gradient_accumulation_steps
    row_tokens = spec.data.packed_tokens if spec.data.packing else tokens / len(train)
    single = min(tokens, spec.training.micro_batch_size * row_tokens)
    if rule.tokens is None:
        return single
    window = min(tokens, steps * single)
    return max(single, window / max(-(-window // rule.tokens), min(rule.at_least, steps)))


def warmup_steps(spec: TrainingSection, total_steps: int) -> int:
    """Updates of linear warm-up; ``SpecError`` if longer than the run: the full rate would never be reached."""
    steps = spec.warmup_steps if spec.warmup_ratio is None else math.ceil(spec.warmup_ratio * total_steps)
    if steps > total_steps:
        raise SpecError(
            f"warm-up of {steps} steps is longer than the run of {total_steps}",
            "training.warmup_steps",
            "lower it, or set training.warmup_ratio",
        )
    return steps


def learning_rate_at(spec: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update that follows ``step`` updates.

    Warm-up reaches the full rate at its last update. Then ``constant`` holds it; ``linear`` and ``cosine`` fall to
    ``min_learning_rate`` over what is left (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return spec.rate * (step + 1) / warmup
    if spec.lr_scheduler == "constant":
        return spec.rate
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - share if spec.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return spec.min_learning_rate + (spec.rate - spec.min_learning_rate) * left


def rate_jump(spec: TrainingSection, made: Sequence[Step], total_steps: int) -> str | None:
    """What the learning rate jumps from and to, if the last update ``made`` had another rate than ``spec`` gives it.

    None: it had not, or none is left to make.
    """
    if not made:
        return None
    last = made[-1]
    following = learning_rate_at(spec, last.step, total_steps)
    same = math.isclose(learning_rate_at(spec, last.step - 1, total_steps), last.learning_rate, rel_tol=1e-9)
    if same or last.step >= total_steps:
        return None
    rates = f"from {last.learning_rate:.3g} at step {last.step:,} to {following:.3g} at step {last.step + 1:,}"
    return f"the learning rate jumps {rates}, as lr_scheduler: {spec.lr_scheduler} over {total_steps:,} steps has it"
