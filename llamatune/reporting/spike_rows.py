"""Which rows a spike was trained on: the order is a function of (seed, epoch), so the log need not hold it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamatune.errors import LlamatuneError
from llamatune.reporting.diagnosis import Diagnosis
from llamatune.reporting.run_log import Run

_DECIDE_THE_ORDER = ("data.", "training.seed", "training.micro_batch_size", "training.gradient_accumulation_steps")


def with_rows(run: Run, diagnosis: Diagnosis) -> Diagnosis:
    """``diagnosis`` with the row numbers of the windows at the spikes' peaks.

    They cannot be told without the prepared data, nor when what decides the order was changed on the way.
    """
    changed = any(line.startswith(_DECIDE_THE_ORDER) for line in run.spec_changes)
    if not diagnosis.spikes or not run.data or changed:
        return diagnosis
    from llamatune.data.batches import Windows, open_prepared
    from llamatune.training.schedule import plan_schedule

    try:
        train = open_prepared(Path(run.spec.data.train)).train
        schedule = plan_schedule(run.spec, train)
        windows = Windows(run.spec, train, schedule.rows_per_window, schedule.windows_per_epoch)
    except LlamatuneError:
        return diagnosis
    named = []
    for spike in diagnosis.spikes:
        batches = windows.micro_batches(spike.window - 1)  # the log counts windows that are consumed
        named.append(replace(spike, rows=sorted(row for batch in batches for row in batch.rows)))
    return replace(diagnosis, spikes=named)
