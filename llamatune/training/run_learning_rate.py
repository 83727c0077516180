"""The learning rate of a run: the spec's, the one that it began with, the default, or the one that is found."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, RateSearch
from llamatune.formats.state_json import list_checkpoints
from llamatune.ranks import Ranks
from llamatune.spec import RunSpec, load_stored_spec
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.rate_choice import BUDGET
from llamatune.training.rate_search import search_learning_rate
from llamatune.training.run_directory import RunDirectory, record_rate_search
from llamatune.training.run_file_names import CHECKPOINTS, SPEC, SUMMARY
from llamatune.training.schedule import Schedule
from llamatune.training.stopping import Stopping


def with_given_rate(spec: RunSpec, overwrite: bool, ranks: Ranks) -> RunSpec:
    """``spec`` with a number or ``auto`` for the learning rate.

    Null is what the run in the output directory began with, whatever the default of its version was; in a new run it
    is ``usual_learning_rate``.
    """
    if spec.training.learning_rate is not None:
        return spec
    rate: float | Literal["auto"] = spec.usual_learning_rate
    if ranks.is_first and not overwrite:
        rate = _rate_of_run(Path(os.path.realpath(spec.training.output_dir))) or rate
    return spec.with_learning_rate(ranks.from_first(rate))


def _rate_of_run(path: Path) -> float | Literal["auto"] | None:
    """The learning rate in the spec of a run that has begun; None: there is no such run."""
    begun = list_checkpoints(path / CHECKPOINTS) or (path / SUMMARY).is_file()
    return load_stored_spec(path / SPEC).training.learning_rate if begun and (path / SPEC).is_file() else None


def with_found_rate(
    spec: RunSpec,
    inputs: Inputs,
    schedule: Schedule,
    learner: Learner,
    run: RunDirectory,
    on_event: OnEvent,
    stopping: Stopping,
    ranks: Ranks,
) -> tuple[RunSpec, RunDirectory]:
    """``spec`` with a number: the one that was found when the run began, or is found now and recorded in ``run``.

    Raises what ``search_learning_rate`` raises; ``Stopped`` also where the time of the run is over.
    """
    if spec.training.learning_rate != "auto":
        return spec, dataclasses.replace(run, rate_search=None)
    search = run.rate_search
    if search is None:
        try:
            search = search_learning_rate(spec, inputs, schedule, learner, run, on_event, stopping.in_wait, ranks)
        except Stopped:
            raise stopping.stopped("a part of the search for the learning rate", run.path, True, ranks) from None
        if ranks.is_first:
            record_rate_search(run.path, search)
        _warn_of_no_gain(search, on_event)
    on_event(Notice(f"learning rate {search.learning_rate:.3g}, found by {search.method}"))
    return spec.with_learning_rate(search.learning_rate), dataclasses.replace(run, rate_search=search)


def _warn_of_no_gain(search: RateSearch, on_event: OnEvent) -> None:
    """Warn where no trial favours its rate."""
    lowest = min((loss for loss in search.losses if loss is not None), default=None)
    if lowest is not None and lowest < search.start_loss:
        return
    found = (
        "every trial diverged" if lowest is None else f"no trial came below the untrained loss {search.start_loss:.4f}"
    )
    todo = "look at the rows, or give training.learning_rate a number"
    on_event(Notice(f"learning rate: {found}, so that {search.learning_rate:.3g} is a guess; {todo}", "warning"))


def rate_facts(spec: RunSpec) -> dict[str, Any]:
    """What a plan says of the rate, for JSON."""
    rate = spec.training.learning_rate
    searched = f"auto: searched before the first step, in at most {BUDGET} micro-batches"
    return {"learning_rate": searched if rate == "auto" else rate}
