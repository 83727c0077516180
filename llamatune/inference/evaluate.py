"""Held-out loss, perplexity and token accuracy on prepared rows, of a tuned model alone or beside its base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.command_options.inference import EvaluateOptions
from llamatune.data.batches import Batch, Prepared, Split, open_prepared
from llamatune.data.model_compatibility import check_rows, check_tokenizer
from llamatune.errors import DataError, NumericsError, SpecError, Stopped
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.prepared import verify_rows
from llamatune.inference.model_source import open_model
from llamatune.inference.significance import ratio_interval
from llamatune.model.loss import IGNORED, target_losses
from llamatune.model.transformer import Transformer
from llamatune.ranks import ALONE, Ranks
from llamatune.shared_work import refuse_differences, shared_map
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
    """Token-weighted means over rows: loss in nats, and the share of target tokens that were the likeliest.

    ``broken`` are the numbers of the rows whose loss is not finite.
    """

    loss: float
    target_tokens: int
    token_accuracy: float
    broken: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[RowScore]) -> HeldOutLoss:
        """Every target token counts the same, whatever its row."""
        targets, correct = sum(row.target_tokens for row in rows), sum(row.correct_tokens for row in rows)
        broken = tuple(row.row for row in rows if not math.isfinite(row.summed_loss))
        loss = math.nan if broken else math.fsum(row.summed_loss for row in rows) / targets
        return cls(loss, targets, correct / targets, broken)

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
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
    idle: Callable[[], None] | None = None,
) -> HeldOutLoss:
    """Mean loss per target token over every row of ``split``, without dropout. Raises ``Stopped`` on request.

    Several ranks share the batches; each has the same mean. ``idle``: what a rank without a batch does meanwhile.
    """

    def score(batch: Batch) -> list[tuple[Any, ...]]:
        with autocast():
            return [astuple(row) for row in score_batch(model, batch)]

    was_training = model.training
    model.eval()
    rows: list[RowScore] = []
    try:
        for scores in shared_map(split.batches(batch_size), score, should_stop, ranks, idle):
            rows += [RowScore(*values) for values in scores]
            on_event(Progress("evaluating", len(rows), len(split)))
    finally:
        model.train(was_training)
    return HeldOutLoss.of(rows)


def smaller_batches(batch_size: int) -> list[str]:
    """Advice for when memory runs out."""
    return ["lower --batch-size"] if batch_size > 1 else []


@dataclass(frozen=True)
class PreparedReport:
    """``scores`` are by the model's prefix, ``base_`` or none; ``splits`` names the split of each row."""

    data: str
    split: str
    dtype: str
    splits: list[str]
    scores: dict[str, list[RowScore]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        rows = self.scores[""]
        values: dict[str, Any] = {
            "data": self.data,
            "split": self.split,
            "rows": len(rows),
            "tokens": sum(row.tokens for row in rows),
            "target_tokens": sum(row.target_tokens for row in rows),
            "dtype": self.dtype,
        }
        for prefix, scores in self.scores.items():
            total = HeldOutLoss.of(scores)
            values[f"{prefix}loss"] = total.loss
            values[f"{prefix}perplexity"] = total.perplexity
            values[f"{prefix}token_accuracy"] = total.token_accuracy
        if "base_" in self.scores:
            pairs = zip(rows, self.scores["base_"], strict=True)
            differences = [tuned.summed_loss - base.summed_loss for tuned, base in pairs]
            values["loss_difference"] = values["loss"] - values["base_loss"]
            values["loss_difference_interval"] = ratio_interval(differences, [row.target_tokens for row in rows])
            values["improved_rows"] = sum(difference < 0 for difference in differences)
        return values

    def per_row(self) -> Iterator[dict[str, Any]]:
        """What ``--per-row`` writes, a line each."""
        for number, (split, row) in enumerate(zip(self.splits, self.scores[""], strict=True)):
            line = {"split": split, "row": row.row, "tokens": row.tokens, "target_tokens": row.target_tokens}
            for prefix, scores in self.scores.items():
                line[f"{prefix}loss"] = scores[number].loss
                line[f"{prefix}correct_tokens"] = scores[number].correct_tokens
            yield line


def evaluate_prepared(
    options: EvaluateOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
) -> PreparedReport:
    """Score the rows of a prepared directory. Several ranks share the batches; each has the whole report.

    Raises:
        SpecError: the data has no such split.
        DataError: no prepared directory. CheckpointError: a file of it is not what its manifest says; a model that
            cannot be used, or not with this data.
        NumericsError: a row's loss is not finite.
        Stopped: ``should_stop`` said so.
    """
    opened = open_model(options, on_event, ranks)
    if ranks.is_first:
        verify_rows(options.data, should_stop=should_stop)
    prepared = open_prepared(options.data)
    refuse_differences({"data": prepared.manifest.digest}, ranks)
    split, chosen = _choose(prepared, options.split, options.data)
    for part in chosen.values():
        for config in opened.configs:
            check_rows(part, config, f"{options.data} against {options.model}", on_event)
    check_tokenizer(prepared, opened.tokenizer_path, options.force_base, on_event)
    total = sum(min(len(part), options.limit or len(part)) for part in chosen.values())
    tokens = sum(sum(part.lengths[: options.limit]) for part in chosen.values())
    advice = opened.memory_advice(*smaller_batches(options.loss_rows))
    with opened.computing(tokens * min(1.0, options.loss_rows / total), advice, on_event):
        loaded = opened.load(on_event, should_stop)
        models = loaded.by_prefix
        names: list[str] = []
        scores: dict[str, list[RowScore]] = {prefix: [] for prefix in models}

        def score(item: tuple[str, Batch, str]) -> tuple[str, str, list[tuple[Any, ...]]]:
            name, batch, prefix = item
            return name, prefix, [astuple(row) for row in score_batch(models[prefix], batch)]

        items = (
            (name, batch, prefix)
            for name, part in chosen.items()
            for batch in part.batches(options.loss_rows, options.limit)
            for prefix in models
        )
        try:
            for name, prefix, rows in shared_map(items, score, should_stop, ranks, loaded.idle):
                for row in (RowScore(*values) for values in rows):
                    if not math.isfinite(row.summed_loss):
                        where = f"{options.data}, row {row.row}"
                        todo = None if opened.dtype_name == "float32" else "try --dtype float32"
                        raise NumericsError("the loss is not finite", where, todo)
                    scores[prefix].append(row)
                if prefix == list(models)[-1]:
                    names += [name] * len(rows)
                    on_event(Progress("evaluating", len(names), total))
        except Stopped:
            raise Stopped("stopped during evaluation", f"after {len(names)} of {total} rows") from None
    return PreparedReport(str(options.data), split, opened.dtype_name, names, scores)


def _choose(prepared: Prepared, name: str | None, where: Path) -> tuple[str, dict[str, Split]]:
    """The name of the chosen split, by default validation, else train; and the splits that it consists of."""
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
