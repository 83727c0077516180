"""Events that the core reports: notices, progress, steps, evaluations, checkpoints. Observers cannot alter the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one line. ``kind`` is ``info`` or ``warning``."""

    message: str
    kind: str = "info"


@dataclass(frozen=True)
class Command:
    """The verb that begins now inside of another one, as a ``line`` that a user would type."""

    line: str


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of ``task`` (total None: unknown); ``tokens_per_second`` of one that generates.

    ``part`` is the share that is done, from 0 to 1, where it is known without ``total``. ``in_bytes``: the units are.
    """

    task: str
    done: int
    total: int | None = None
    tokens_per_second: float | None = None
    part: float | None = None
    in_bytes: bool = False

    @property
    def share(self) -> float | None:
        """The share that is done, from 0 to 1; None where the end is not known."""
        return self.done / self.total if self.total else self.part


@dataclass(frozen=True)
class RunStarted:
    """What will be trained, or continued after ``resumed_step`` updates that took ``elapsed_s``.

    ``evaluates_first``: an evaluation comes before the first step, which has to wait for it. ``losses`` are those
    of the updates that were made before, in their order.
    """

    trainable_parameters: int
    total_parameters: int
    train_rows: int
    validation_rows: int
    total_steps: int
    num_epochs: float
    resumed_step: int
    device: str
    elapsed_s: float = 0.0
    evaluates_first: bool = False
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One optimizer update as ``metrics.jsonl`` keeps it; ``grad_norm`` is from before clipping.

    ``loss`` is the mean over the target tokens of the whole accumulation window.
    """

    event: ClassVar[str] = "step"
    step: int
    window: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float
    target_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class StepDone(Step):
    """An update that was just made, with what is shown of it beside its record."""

    total_steps: int
    num_epochs: float
    peak_reserved_bytes: int | None = None


@dataclass(frozen=True)
class MemoryHeld:
    """Bytes that stay in memory between updates, reported after the first update of a process.

    ``trained_bytes`` are the adapter's; in full fine-tuning all weights', and ``frozen_bytes`` is 0. ``device_bytes``
    is the memory of the device.
    """

    frozen_bytes: int
    trained_bytes: int
    optimizer_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class StepSkipped:
    """An fp16 overflow: the window was consumed, no update was made, and ``loss_scale`` is the lowered scale."""

    event: ClassVar[str] = "skipped"
    window: int
    loss_scale: float


@dataclass(frozen=True)
class EvalDone:
    """Token-weighted validation loss after ``step`` updates, on ``rows`` rows; ``seconds`` is how long it took.

    That of step 0, before training, is never ``best``. A reader of ``metrics.jsonl`` fills in ``step`` and ``loss``
    alone.
    """

    event: ClassVar[str] = "eval"
    step: int
    loss: float
    perplexity: float = 0.0
    best: bool = False
    epoch: float = 0.0
    rows: int = 0
    target_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What the model answered to a prompt of ``evaluation.prompts`` after ``step`` updates; 0: before training.

    ``number`` counts the prompts from 1. ``prompt`` and ``reference``, the answer that its row has, are cut where they
    are long. ``tokens`` are the answer's; ``finish_reason``: ``eos`` or ``length``.
    """

    event: ClassVar[str] = "answer"
    step: int
    number: int
    prompt: str
    answer: str
    reference: str | None
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class AnswersDone:
    """All prompts of ``evaluation.prompts`` were answered after ``step`` updates, in so many ``seconds``."""

    step: int
    answers: tuple[Answer, ...]
    seconds: float


@dataclass(frozen=True)
class EarlyStop:
    """Patience ended the run after the evaluation of ``step``; that of ``best_step`` was the lowest.

    ``loss`` is None where an earlier version computed it. ``evaluations_without_improvement`` came in a row, this one
    included.
    """

    event: ClassVar[str] = "early_stop"
    step: int
    loss: float | None
    evaluations_without_improvement: int
    best_step: int
    best_eval_loss: float


@dataclass(frozen=True)
class RateSearch:
    """The search for ``training.learning_rate: auto`` before the first step, as ``metrics.jsonl`` keeps it.

    ``losses`` are held-out losses of the trials at ``rates``, after ``updates`` of one micro-batch each; None: the
    trial diverged. ``start_loss`` is that of the untrained weights. ``micro_batches`` were computed in all.
    """

    event: ClassVar[str] = "learning_rate_search"
    learning_rate: float
    method: str
    rates: list[float]
    losses: list[float | None]
    start_loss: float
    updates: int
    micro_batches: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is durable at ``path``; ``seconds`` is how long saving took."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class EpochMeans:
    """Token-weighted means of one whole epoch as ``metrics.jsonl`` keeps them, and the last validation inside it.

    ``validation_loss`` is None where there was none. ``epoch_s`` is its whole time, ``evaluation_s`` and
    ``checkpoint_s`` are parts of it; ``tokens_per_second`` counts no padding, and only the time of the updates. Of
    epochs that earlier versions trained these are None.
    """

    event: ClassVar[str] = "epoch"
    epoch: int
    train_loss: float
    train_perplexity: float
    validation_loss: float | None
    validation_perplexity: float | None
    epoch_s: float | None
    evaluation_s: float | None
    checkpoint_s: float | None
    target_tokens: int | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class EpochDone(EpochMeans):
    """An epoch that has just ended, with what is shown of it beside its record."""

    num_epochs: float
    elapsed_s: float

    def means(self) -> EpochMeans:
        """The record alone."""
        return EpochMeans(**{entry.name: getattr(self, entry.name) for entry in fields(EpochMeans)})


Event = (
    Notice
    | Command
    | Progress
    | RunStarted
    | StepDone
    | MemoryHeld
    | StepSkipped
    | EvalDone
    | AnswersDone
    | CheckpointSaved
    | EpochDone
)
OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def ignore_event(event: Event) -> None:
    """An observer that does nothing."""


def never_stop() -> bool:
    """Asks for no stop."""
    return False
