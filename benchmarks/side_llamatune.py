"""One epoch with llamatune: ``python benchmarks/side_llamatune.py SPEC.yaml``.

The last line on stdout is a JSON object: seconds from the first window to the last update, losses, memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llamatune.events import Event, RunStarted, StepDone
from llamatune.spec import load_spec
from llamatune.training.train import train


def main() -> None:
    """Train and report."""
    losses: list[float] = []
    times: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, RunStarted | StepDone):
            times.append(time.monotonic())
        if isinstance(event, StepDone):
            losses.append(event.loss)

    summary = train(load_spec(Path(sys.argv[1])), on_event=on_event)
    report = {
        "loop_s": times[-1] - times[0],
        "losses": losses,
        "trainable_parameters": summary["trainable_parameters"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "peak_reserved_bytes": summary["peak_reserved_bytes"],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
