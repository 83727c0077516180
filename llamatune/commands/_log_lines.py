"""Events as ``key=value`` lines on stderr, for logs."""

from __future__ import annotations

import sys
import time

from llamatune import events
from llamatune.errors import printable
from llamatune.units import epoch_text, perplexity_text

_PROGRESS_INTERVAL_S = 10.0


class KeyValueLines:
    """One line an event. Progress of a long task is written every ten seconds."""

    def __init__(self, log_every_steps: int) -> None:
        self._log_every_steps = log_every_steps
        self._last_progress = time.monotonic()

    def draw(self, event: events.Event) -> None:
        line = self._line(event)
        if line:
            sys.stderr.write(printable(line) + "\n")
            sys.stderr.flush()

    def _line(self, event: events.Event) -> str | None:
        match event:
            case events.Notice():
                return f"{event.kind}: {event.message}"
            case events.Command():
                return f"$ {event.line}"
            case events.Progress():
                now = time.monotonic()
                if now - self._last_progress < _PROGRESS_INTERVAL_S:
                    return None
                self._last_progress = now
                total = "" if event.total is None else f"/{event.total}"
                speed = "" if event.tokens_per_second is None else f" {_fields(event, 'tokens_per_second:.0f')}"
                return f"{event.task.replace(' ', '_')}={event.done}{total}{speed}"
            case events.RunStarted():
                counts = "trainable_parameters total_parameters train_rows validation_rows total_steps resumed_step"
                return f"device={event.device} {_fields(event, counts)}"
            case events.StepDone():
                if event.step % self._log_every_steps and event.step != event.total_steps:
                    return None
                epoch = f"epoch={epoch_text(event.epoch, event.num_epochs)}/{event.num_epochs}"
                measures = (
                    "loss:.4f learning_rate:.3g grad_norm:.3f tokens_per_second:.0f peak_memory_bytes elapsed_s:.1f"
                )
                return f"{epoch} step={event.step}/{event.total_steps} {_fields(event, measures)}"
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
                return f"epoch={min(event.epoch, event.num_epochs)}/{event.num_epochs} {shown} {times}"


def _fields(event: events.Event, names: str) -> str:
    """``key=value`` of the named fields, each in the format behind its colon: ``loss:.4f``."""
    declared = (name.partition(":") for name in names.split())
    return " ".join(f"{name}={getattr(event, name):{form}}" for name, _, form in declared)
