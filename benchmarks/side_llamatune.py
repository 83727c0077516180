"""One epoch with llamatune: ``python benchmarks/side_llamatune.py SPEC.json``.

The last line on stdout is a JSON object: seconds from the first window to the last update, losses, memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from drawn_base import drawing_on_device, start_of

from llamatune.events import Event, RunStarted, StepDone
from llamatune.spec import build_spec
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

    values, start = start_of(json.loads(Path(sys.argv[1]).read_text()))
    spec = build_spec(values, sys.argv[1])
    with drawing_on_device(spec.training.device, start=start):
        summary = train(spec, on_event=on_event)
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
