"""Loss, perplexity and token accuracy on prepared rows: of a model, or of a base and a tuned one side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.data.dataset import Batch, Prepared, Split, check_rows, check_tokenizer, open_prepared
from llamatune.errors import DataError, NumericsError, SpecError, Stopped
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.inference.opened import OpenedModel, open_model
from llamatune.inference.significance import Accuracy, ratio_interval
from llamatune.model.loss import IGNORED, target_losses
from llamatune.model.transformer import Transformer
from llamatune.out_of_memory import memory_faults
from llamatune.threads import suitable_threads
from llamatune.units import perplexity


@dataclass(frozen=True)
class RowScore:
    """One row: its number in the input file from 1, its loss summed over its target tokens in nats."""

    row: int
    tokens: int
    target_tokens: int
    summed_loss: float
    correct_tokens: int

    @property
    def loss(self) -> float:
        return self.summed_loss / self.target_tokens


@dataclass(frozen=True)
class HeldOutLoss:
    """Token-weighted means over rows: loss in nats, and the share of target tokens that were the likeliest."""

    loss: float
    target_tokens: int
    token_accuracy: float

    @classmethod
    def of(cls, rows: Sequence[RowScore]) -> HeldOutLoss:
        """Every target token counts the same, whatever its row."""
        targets = sum(row.target_tokens for row in rows)
        correct = Accuracy(sum(row.correct_tokens for row in rows), targets)
        return cls(math.fsum(row.summed_loss for row in rows) / targets, targets, correct.fraction)

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@torch.no_grad()
def score_batch(model: Transformer, batch: Batch) -> list[RowScore]:
    """The score of each row of a batch, in its order; the model is in evaluation mode."""
    losses, correct = target_losses(model, batch.input_ids, batch.labels, batch.lengths)
    per_token = (batch.labels[0] != IGNORED, losses, correct)
    per_row = zip(*(torch.split(values, list(batch.lengths)) for values in per_token), strict=True)
    return [
        RowScore(row, len(losses), int(targets.sum()), float(losses.sum()), int(correct.sum()))
        for row, (targets, losses, correct) in zip(batch.rows, per_row, strict=True)
    ]


def held_out_loss(
    model: Transformer,
    split: Split,
    batch_size: int,
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    should_stop: ShouldStop = never_stop,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutLoss:
    """Mean loss per target token over every row of ``split``, dropout off; ``Stopped`` when asked to."""
    was_training = model.training
    model.eval()
    rows: list[RowScore] = []
    try:
        for batch in split.batches(batch_size):
            if should_stop():
                raise Stopped("stopped during evaluation")
            with autocast():
                rows += score_batch(model, batch)
            on_batch(len(rows), len(split))
    finally:
        model.train(was_training)
    return HeldOutLoss.of(rows)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which model is evaluated on what; ``compare`` evaluates the base beside it. What every kind of data takes."""

    model: Path
    data: Path
    adapter: Path | None = None
    compare: bool = False
    limit: int | None = None
    batch_size: int = 16
    force_base: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        for name, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise SpecError(f"{name} is {value}, it must be at least 1")

    def open_model(self, on_event: OnEvent) -> OpenedModel:
        """The model and the adapter, checked."""
        return open_model(self.model, self.adapter, self.compare, self.force_base, self.dtype, self.device, on_event)


MEMORY_ADVICE = "lower --batch-size, or use a 16-bit --dtype"


@dataclass(frozen=True, kw_only=True)
class PreparedEvaluation(Evaluation):
    """``data`` is a prepared directory, ``limit`` the rows of each split.

    ``split`` is train, validation or all; None: validation if there is one, else train.
    """

    split: str | None = None


@dataclass(frozen=True)
class PreparedReport:
    """``scores`` holds the rows' by the model's prefix, ``base_`` or none; ``splits`` names each row's split."""

    data: str
    split: str
    dtype: str
    splits: list[str]
    scores: dict[str, list[RowScore]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        rows = self.scores[""]
        found: dict[str, Any] = {
            "data": self.data,
            "split": self.split,
            "rows": len(rows),
            "tokens": sum(row.tokens for row in rows),
            "target_tokens": sum(row.target_tokens for row in rows),
            "dtype": self.dtype,
        }
        for prefix, scores in self.scores.items():
            total = HeldOutLoss.of(scores)
            found[f"{prefix}loss"] = total.loss
            found[f"{prefix}perplexity"] = total.perplexity
            found[f"{prefix}token_accuracy"] = total.token_accuracy
        if "base_" in self.scores:
            pairs = zip(rows, self.scores["base_"], strict=True)
            differences = [tuned.summed_loss - base.summed_loss for tuned, base in pairs]
            found["loss_difference"] = found["loss"] - found["base_loss"]
            found["loss_difference_interval"] = ratio_interval(differences, [row.target_tokens for row in rows])
            found["improved_rows"] = sum(difference < 0 for difference in differences)
        return found

    def per_row(self) -> Iterator[dict[str, Any]]:
        """What ``--per-row`` writes, a line each."""
        for number, (split, row) in enumerate(zip(self.splits, self.scores[""], strict=True)):
            line = {"split": split, "row": row.row, "tokens": row.tokens, "target_tokens": row.target_tokens}
            for prefix, scores in self.scores.items():
                line[f"{prefix}loss"] = scores[number].loss
                line[f"{prefix}correct_tokens"] = scores[number].correct_tokens
            yield line


def evaluate_prepared(
    evaluation: PreparedEvaluation, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> PreparedReport:
    """Score the rows of a prepared directory.

    Raises:
        SpecError: nothing to compare with, or no such split.
        DataError: no prepared directory. CheckpointError: a model that cannot be used, or not with this data.
        NumericsError: a row's loss is not finite.
        Stopped: ``should_stop`` said so.
    """
    opened = evaluation.open_model(on_event)
    prepared = open_prepared(evaluation.data)
    split, chosen = _choose(prepared, evaluation.split, evaluation.data)
    for part in chosen.values():
        check_rows(part, opened.checkpoint.config, f"{evaluation.data} against {evaluation.model}", on_event)
    check_tokenizer(prepared, evaluation.model, evaluation.force_base, on_event)
    total = sum(min(len(part), evaluation.limit or len(part)) for part in chosen.values())
    tokens = sum(sum(part.lengths[: evaluation.limit]) for part in chosen.values())
    threads = suitable_threads(opened.checkpoint.config, tokens * min(1.0, evaluation.batch_size / total))
    with memory_faults(opened.device, MEMORY_ADVICE), threads:
        models = opened.load(on_event, should_stop)
        names: list[str] = []
        scores: dict[str, list[RowScore]] = {prefix: [] for prefix in models}
        for name, part in chosen.items():
            for batch in part.batches(evaluation.batch_size, evaluation.limit):
                for prefix, model in models.items():
                    if should_stop():
                        raise Stopped("stopped during evaluation", f"after {len(names)} of {total} rows")
                    scores[prefix] += _finite(score_batch(model, batch), evaluation.data)
                names += [name] * len(batch.rows)
                on_event(Progress("evaluating", len(names), total))
    return PreparedReport(str(evaluation.data), split, opened.dtype_name, names, scores)


def _choose(prepared: Prepared, name: str | None, where: Path) -> tuple[str, dict[str, Split]]:
    """The split asked for, by its name, and the parts that it is made of."""
    if name not in (None, "train", "validation", "all"):
        raise SpecError(f"no split is called {name!r}", "--split", "use train, validation or all")
    parts = {"train": prepared.train}
    if prepared.validation is not None and len(prepared.validation):
        parts["validation"] = prepared.validation
    name = name or list(parts)[-1]
    if name == "validation" and name not in parts:
        raise SpecError("it has no validation rows", where, "use --split train, or prepare it with a validation split")
    chosen = parts if name == "all" else {name: parts[name]}
    if not any(len(part) for part in chosen.values()):
        raise DataError(f"no rows in the split {name!r}", where)
    return name, chosen


def _finite(scores: list[RowScore], where: Path) -> list[RowScore]:
    for score in scores:
        if not math.isfinite(score.summed_loss):
            raise NumericsError("the loss is not finite", f"{where}, row {score.row}", "try --dtype float32")
    return scores
