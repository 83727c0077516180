"""llamatune as on a larger model: each step takes at least ``SLOWED_S`` in the first ``SLOWED_STARTS`` starts of a job.

So a job of a minute is stopped as often as a test wants, however fast the machine is. Nothing else is changed: the
pause comes where rank 0 draws a step, and the others wait for it in the next sum.
"""

from __future__ import annotations

import os
import time

from llamatune.cli import main
from llamatune.commands._console import Console
from llamatune.events import Event, StepDone

draw = Console.on_event


def draw_and_wait(console: Console, event: Event) -> None:
    draw(console, event)
    early = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ["SLOWED_STARTS"])
    if isinstance(event, StepDone) and early:
        time.sleep(float(os.environ["SLOWED_S"]))


if __name__ == "__main__":
    Console.on_event = draw_and_wait  # type: ignore[method-assign]
    main()
