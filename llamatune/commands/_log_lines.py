"""Events as lines on stderr, for logs: time of day, kind, and ``key=value``."""

from __future__ import annotations

import json
import sys
import time

from llamatune import events
from llamatune.commands._time_left import RunTimeLeft, TaskTimeLeft
from llamatune.errors import printable
from llamatune.units import clock_duration, epoch_text, perplexity_text

_PROGRESS_INTERVAL_S = 10.0
_LONGEST_ANSWER = 100


class KeyValueLines:
    """One line an event, which begins with the local time, as Slurm's own lines have it, and the kind of the event.

    Progress of a task that takes longer is written every ten seconds.
    """

    def __init__(self, log_every_steps: int) -> None:
        self._log_every_steps = log_every_steps
        self._last_progress: dict[str, float] = {}
        self._run_left, self._task_left = RunTimeLeft(), TaskTimeLeft()

    def draw(self, event: events.Event) -> None:
        lines = map(_answer_line, event.answers) if isinstance(event, events.AnswersDone) else [self._line(event)]
        for line in filter(None, lines):
            sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {printable(line)}\n")
            sys.stderr.flush()

    def _line(self, event: events.Event) -> str | None:
        match event:
            case events.AnswersDone():
                return None  # a line each
            case events.Notice():
                return f"{event.kind}: {event.message}"
            case events.Command():
                return f"$ {event.line}"
            case events.Progress():
                left = self._task_left.after(event)
                now = time.monotonic()
                last = self._last_progress.pop(event.task, now)
                is_due, is_done = now - last >= _PROGRESS_INTERVAL_S, event.share is not None and event.share >= 1
                if not is_done:
                    self._last_progress[event.task] = now if is_due else last
                if not is_due:
                    return None
                return f"progress {_progress(event)}{_left(left)}"
            case events.RunStarted():
                counts = "trainable_parameters total_parameters train_rows validation_rows total_steps resumed_step"
                return f"start device={event.device} {_fields(event, counts)}"
            case events.StepDone():
                left = self._run_left.after(event)
                if event.step % self._log_every_steps and event.step != event.total_steps:
                    return None
                epoch = f"epoch={epoch_text(event.epoch, event.num_epochs)}/{event.num_epochs}"
                measures = (
                    "loss:.4f learning_rate:.3g grad_norm:.3f tokens_per_second:.0f peak_memory_bytes elapsed_s:.1f"
                )
                return f"train {epoch} step={event.step}/{event.total_steps} {_fields(event, measures)}{_left(left)}"
            case events.MemoryHeld():
                return f"held {_fields(event, 'frozen_bytes trained_bytes optimizer_bytes device_bytes')}"
            case events.StepSkipped():
                return f"skipped {_fields(event, 'window loss_scale:g')}"
            case events.EvalDone():
                best = " best=true" if event.best else ""
                place = "" if event.step else " before_training=true"
                shown = f"perplexity={perplexity_text(event.perplexity, 4)} seconds={event.seconds:.1f}"
                return f"eval {_fields(event, 'step loss:.4f')} {shown}{best}{place}"
            case events.CheckpointSaved():
                return f"saved step={event.step} path={event.path} seconds={event.seconds:.2f}"
            case events.EpochDone():
                losses = {"train": (event.train_loss, event.train_perplexity)}
                if event.validation_loss is not None and event.validation_perplexity is not None:
                    losses["validation"] = (event.validation_loss, event.validation_perplexity)
                shown = " ".join(
                    f"{name}_loss={loss:.4f} {name}_perplexity={perplexity_text(perplexity, 4)}"
                    for name, (loss, perplexity) in losses.items()
                )
                times = _fields(event, "epoch_s:.1f tokens_per_second:.0f elapsed_s:.1f")
                return f"epoch epoch={min(event.epoch, event.num_epochs)}/{event.num_epochs} {shown} {times}"


def _progress(event: events.Progress) -> str:
    total = "" if event.total is None else f"/{event.total}"
    part = "" if event.part is None or event.total is not None else f" percent={100 * event.part:.0f}"
    speed = "" if event.tokens_per_second is None else f" {_fields(event, 'tokens_per_second:.0f')}"
    return f"{event.task.replace(' ', '_')}={event.done}{total}{part}{speed}"


def _left(seconds: float | None) -> str:
    """The time left at the end of a line."""
    return "" if seconds is None else f" left={clock_duration(seconds)}"


def _answer_line(answer: events.Answer) -> str:
    """The beginning of the answer is in quotes, as JSON."""
    short = answer.answer[:_LONGEST_ANSWER] + ("..." if len(answer.answer) > _LONGEST_ANSWER else "")
    return f"answer {_fields(answer, 'step number tokens finish_reason')} text={json.dumps(short, ensure_ascii=False)}"


def _fields(event: events.Event | events.Answer, names: str) -> str:
    """``key=value`` of the named fields, each in the format behind its colon: ``loss:.4f``."""
    declared = (name.partition(":") for name in names.split())
    return " ".join(f"{name}={getattr(event, name):{form}}" for name, _, form in declared)
