"""Events as ``key=value`` lines on stderr, for logs."""

from __future__ import annotations

import sys
import time

from llamatune.errors import printable
from llamatune.events import (
    CheckpointSaved,
    EpochDone,
    EvalDone,
    Event,
    MemoryHeld,
    Notice,
    Progress,
    RunStarted,
    StepDone,
    StepSkipped,
)

_PROGRESS_INTERVAL_S = 10.0


class KeyValueLines:
    """One line an event. Progress of a long task is written every ten seconds."""

    def __init__(self, log_every_steps: int = 1) -> None:
        self._log_every_steps = log_every_steps
        self._last_progress = time.monotonic()
        self._announced: set[str] = set()

    def draw(self, event: Event) -> None:
        line = self._line(event)
        if line:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def _line(self, event: Event) -> str | None:
        match event:
            case Notice():
                return f"{event.kind}: {printable(event.message)}"
            case Progress():
                return self._progress(event)
            case RunStarted():
                return (
                    f"device={event.device} trainable_parameters={event.trainable_parameters} "
                    f"total_parameters={event.total_parameters} train_rows={event.train_rows} "
                    f"validation_rows={event.validation_rows} total_steps={event.total_steps} "
                    f"resumed_step={event.resumed_step}"
                )
            case StepDone():
                if event.step % self._log_every_steps and event.step != event.total_steps:
                    return None
                return (
                    f"epoch={min(int(event.epoch - 1e-9) + 1, event.num_epochs)}/{event.num_epochs} "
                    f"step={event.step}/{event.total_steps} loss={event.loss:.4f} "
                    f"learning_rate={event.learning_rate:.3g} grad_norm={event.grad_norm:.3f} "
                    f"tokens_per_second={event.tokens_per_second:.0f} "
                    f"peak_memory_bytes={event.peak_memory_bytes} elapsed_s={event.elapsed_s:.1f}"
                )
            case MemoryHeld():
                return (
                    f"held frozen_bytes={event.frozen_bytes} trained_bytes={event.trained_bytes} "
                    f"optimizer_bytes={event.optimizer_bytes} device_bytes={event.device_bytes}"
                )
            case StepSkipped():
                return f"skipped window={event.window} loss_scale={event.loss_scale:g}"
            case EvalDone():
                best = " best=true" if event.best else ""
                return f"eval step={event.step} loss={event.loss:.4f} perplexity={event.perplexity:.4f}{best}"
            case CheckpointSaved():
                return f"saved step={event.step} path={printable(event.path)} seconds={event.seconds:.2f}"
            case EpochDone():
                held_out = ""
                if event.validation_loss is not None:
                    held_out = (
                        f"validation_loss={event.validation_loss:.4f} "
                        f"validation_perplexity={event.validation_perplexity:.4f} "
                    )
                return (
                    f"epoch={event.epoch}/{event.num_epochs} train_loss={event.train_loss:.4f} "
                    f"train_perplexity={event.train_perplexity:.4f} {held_out}epoch_s={event.epoch_s:.1f} "
                    f"tokens_per_second={event.tokens_per_second:.0f} elapsed_s={event.elapsed_s:.1f}"
                )

    def _progress(self, event: Progress) -> str | None:
        now = time.monotonic()
        if now - self._last_progress < _PROGRESS_INTERVAL_S:
            return None
        self._last_progress = now
        total = "" if event.total is None else f"/{event.total}"
        return f"{event.task.replace(' ', '_')}={event.done}{total}"
