"""``run_sweep``: trains every run of a sweep that is not finished, then writes the table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamatune import __version__
from llamatune.command_options.sweep import SweepOptions
from llamatune.errors import LlamatuneError, NumericsError, OutOfMemory, Stopped
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.spec_grid import Axis, in_words
from llamatune.strict_json import dump_json
from llamatune.sweeping.groups import Room, groups, room_for
from llamatune.sweeping.joint_progress import Several
from llamatune.sweeping.joint_training import Outcome, train_alone, train_together
from llamatune.sweeping.members import Member, plan_members
from llamatune.sweeping.sweep_page import write_page
from llamatune.sweeping.sweep_table import best_of, markdown
from llamatune.sweeping.worker_processes import train_in_workers
from llamatune.training.run_collection import claimed, refuse_other
from llamatune.training.run_directory import write_if_changed
from llamatune.training.run_file_names import RUNS, SUMMARY

PAGE, TABLE, RESULT = "report.html", "sweep.md", "sweep.json"
_FIGURES = (
    *("steps", "train_loss", "start_eval_loss", "best_eval_loss", "best_step", "trainable_parameters"),
    *("peak_memory_bytes", "runtime_s", "tokens_per_second", "energy_j"),
)
"""Of a run's summary."""
_STATUSES: dict[type[LlamatuneError], str] = {NumericsError: "not finite", OutOfMemory: "out of memory"}
"""What is a result, like another."""


@dataclass(frozen=True)
class Sweep:
    """The axes and a result for every combination, in the grid's order; ``best`` is a name."""

    axes: tuple[Axis, ...]
    runs: list[dict[str, Any]]
    best: str | None
    output: Path
    spec: str
    has_page: bool = False

    def payload(self) -> dict[str, Any]:
        """The content of ``sweep.json``."""
        return {
            "llamatune": __version__,
            "spec": self.spec,
            "output": str(self.output),
            "axes": [asdict(axis) for axis in self.axes],
            "runs": self.runs,
            "best": self.best,
        }


def run_sweep(
    options: SweepOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    began_s: float | None = None,
) -> Sweep:
    """Train what is not finished yet below the output directory; write ``sweep.json`` and ``sweep.md`` there.

    A run whose loss is not finite, or that has too little memory, is a result like another. ``training.max_time`` is
    that of all runs together, since ``began_s`` of the monotonic clock (None: since now).

    Raises:
        LlamatuneError: the output directory cannot be used, no run could be trained, or one has another fault; all
            others are trained before.
        Stopped: ``should_stop`` returned True, or a run is out of time; each has saved, and the same call continues.
    """
    began_s = time.monotonic() if began_s is None else began_s
    output = Path(os.path.realpath(options.output))
    refuse_other(output, RUNS, options.overwrite)
    axes, members = plan_members(options)
    with claimed(output, RUNS, options.overwrite):
        outcomes = _train_all(members, options, on_event, should_stop, began_s)
        runs = [_result(member, outcomes.get(member.name)) for member in members]
        _raise_faults(outcomes)
        sweep = Sweep(axes, runs, best_of(runs), options.output, str(options.spec_path))
        write_if_changed(output / RESULT, dump_json(sweep.payload()))
        write_if_changed(output / TABLE, markdown(axes, runs, sweep.best).encode())
        has_page = write_page(options.output / PAGE, [member.path for member in members], on_event, should_stop)
    return replace(sweep, has_page=has_page)


def _train_all(
    members: Sequence[Member], options: SweepOptions, on_event: OnEvent, should_stop: ShouldStop, began_s: float
) -> dict[str, Outcome]:
    """The outcome of every member that has a spec, by its name."""
    outcomes: dict[str, Outcome] = {}
    for refused in (member for member in members if member.spec is None):
        on_event(Notice(f"{in_words(refused.values)} is no run: {refused.refusal}", "warning"))
    total = sum(member.spec is not None for member in members)
    for batch, room in _batches(members, options):
        first, last = len(outcomes) + 1, len(outcomes) + len(batch)
        words = "; ".join(in_words(member.values) for member in batch)
        if room is None:
            on_event(Notice(f"run {first} of {total}: {words}"))
            found = {batch[0].name: train_alone(batch[0], options.force_base, on_event, should_stop, began_s)}
        else:
            on_event(Notice(f"runs {first} to {last} of {total}, {room.told(len(batch))}: {words}"))
            train_several = train_in_workers if room.processes > 1 else train_together
            with Several(batch, on_event) as several:
                found = train_several(batch, room, options.force_base, several.observer, should_stop, began_s)
        outcomes |= found
        for name, outcome in found.items():
            if isinstance(outcome, LlamatuneError) and not isinstance(outcome, Stopped):
                on_event(Notice(f"{name}: {outcome}", "warning"))
        for name, outcome in found.items():
            if isinstance(outcome, Stopped):
                done = sum(isinstance(outcome, dict) for outcome in outcomes.values())
                what = f"{name} {outcome.what}; {done} of {total} runs are finished"
                raise Stopped(what, options.output, outcome.todo or "run the same command again to continue")
    return outcomes


def _batches(members: Sequence[Member], options: SweepOptions) -> Iterator[tuple[list[Member], Room | None]]:
    """What is trained one after another: members of one group at once, with their room, or one alone, with None.

    Members that are finished come first: they are only read.
    """
    for group in groups(members):
        finished = [member for member in group if (member.path / SUMMARY).is_file()]
        rest = [member for member in group if member not in finished]
        room = _room(rest, options) if len(rest) > 1 and options.at_once != 1 else None
        at_once = 1 if room is None else room.at_once
        yield from (([member], None) for member in finished)
        for start in range(0, len(rest), at_once):
            batch = rest[start : start + at_once]
            yield batch, room if len(batch) > 1 else None


def _room(group: Sequence[Member], options: SweepOptions) -> Room | None:
    """That of a group; None where its inputs cannot be opened, which its runs then report."""
    try:
        return room_for(group, options.force_base, options.at_once)
    except LlamatuneError:
        return None


def _result(member: Member, outcome: Outcome | None) -> dict[str, Any]:
    """A run's values, status and figures, for JSON."""
    known = {"name": member.name, "values": dict(member.values), "output_dir": str(member.path)}
    figures: dict[str, Any] = dict.fromkeys(_FIGURES)
    if outcome is None:
        return {**known, "status": "refused", "reason": member.refusal, **figures}
    if isinstance(outcome, LlamatuneError):
        return {**known, "status": _STATUSES.get(type(outcome), "failed"), "reason": str(outcome), **figures}
    status = "stopped early" if outcome.get("stopped_early") else "finished"
    return {**known, "status": status, "reason": None, **{key: outcome.get(key) for key in _FIGURES}}


def _raise_faults(outcomes: Mapping[str, Outcome]) -> None:
    """Raise what is no result, or the first fault where there is no result at all."""
    faults = [(name, outcome) for name, outcome in outcomes.items() if isinstance(outcome, LlamatuneError)]
    others = [fault for _, fault in faults if type(fault) not in _STATUSES]
    if others:
        raise others[0]
    if len(faults) == len(outcomes):
        raise faults[0][1]
