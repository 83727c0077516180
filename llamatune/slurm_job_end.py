"""When the Slurm job of this process ends, by its variables or by scontrol, and the time that is left until then."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llamatune.errors import printable
from llamatune.events import Notice, OnEvent
from llamatune.units import slurm_seconds

END, JOB = "SLURM_JOB_END_TIME", "SLURM_JOB_ID"
_ARRAY, _TASK = "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"
ANSWER_S = 3.0
"""How long scontrol may take."""
_RUN_TIME_S = 1.0
"""By which a job may have run longer than its RunTime, which is in whole seconds."""
_JUMP_S = 2.0
"""By how much the two clocks may disagree: RunTime of scontrol is in whole seconds."""


@dataclass(frozen=True)
class Clock:
    """Two clocks in seconds: one that only goes forward, and the time of day, which may be set."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class JobEndUnknown(Exception):
    """The text says why, in a few words."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as scontrol finds it: ``name`` is its number, or that of an array and its task: ``16_3``."""

    name: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """The job of this process. SLURM_JOB_ID of an array's last task is the number of the whole array."""
        array, task, job = (environment.get(name, "").strip() for name in (_ARRAY, _TASK, JOB))
        name = f"{array}_{task}" if array and task else job
        return cls(name) if re.fullmatch(r"[0-9]{1,12}(_[0-9]{1,12})?", name) else None

    def left_s(self) -> float:
        """Seconds until the end by the controller's own clock; infinite without a limit.

        Raises:
            JobEndUnknown: scontrol is missing, fails or does not answer in time, or the job does not run.
        """
        command = ["scontrol", "--oneliner", "show", "job", self.name]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise JobEndUnknown(f"scontrol gave no answer within {ANSWER_S:g} s") from None
        except OSError as fault:
            raise JobEndUnknown(f"scontrol does not run: {fault.strerror}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise JobEndUnknown(f"scontrol failed: {printable(said[-1][:200]) if said else f'exit {done.returncode}'}")
        return left_in(done.stdout.decode(errors="replace"))


def left_in(record: str) -> float:
    """Seconds that are left to a running job, from its line of ``scontrol --oneliner show job``."""
    times = re.search(r" RunTime=(\S+) TimeLimit=(\S+) TimeMin=", record)
    state = re.search(r" JobState=(\S+) Reason=", record)
    if times is None or state is None:
        raise JobEndUnknown("scontrol's answer has no RunTime and TimeLimit")
    if state[1] not in ("RUNNING", "COMPLETING"):
        raise JobEndUnknown(f"scontrol says that the job is {printable(state[1])}")
    if times[2] == "UNLIMITED":
        return math.inf
    run, limit = (slurm_seconds(text) for text in times.groups())
    if run is None or limit is None:
        raise JobEndUnknown(f"scontrol says RunTime={printable(times[1])} TimeLimit={printable(times[2])}")
    return limit - run - _RUN_TIME_S


class Countdown:
    """The seconds that are left until an end; ``what`` names it, and of them ``margin_s`` are to be left unused.

    The end of a ``job`` is a time of day: it is kept on both clocks. Where they come to disagree, because one was set
    or stood still, scontrol decides, or else the earlier of the two ends.
    """

    def __init__(self, what: str, left_s: float, margin_s: float, clock: Clock, job: SlurmJob | None = None) -> None:
        self.what, self.margin_s = what, margin_s
        self._clock, self._job, self._answers = clock, job, job is not None
        self._set(left_s)

    def _set(self, left_s: float) -> None:
        self._end, self._wall_end = self._clock.monotonic() + left_s, self._clock.wall() + left_s

    def left_s(self) -> float:
        left_s = self._end - self._clock.monotonic()
        if self._job is not None and math.isfinite(left_s):
            left_by_wall_s = self._wall_end - self._clock.wall()
            if abs(left_by_wall_s - left_s) > _JUMP_S:
                self._set(min(left_s, left_by_wall_s))
                self.ask_again()
                left_s = self._end - self._clock.monotonic()
        return left_s

    def ask_again(self) -> None:
        """Take the end from scontrol, which knows of a limit that was changed; once it fails, it is asked no more."""
        if self._job is None or not self._answers:
            return
        try:
            left_s = self._job.left_s()
        except JobEndUnknown:
            self._answers = False
            return
        if abs(left_s - (self._end - self._clock.monotonic())) > _JUMP_S:
            self._set(left_s)


def job_end(
    margin_s: float, clock: Clock, on_event: OnEvent, environment: Mapping[str, str] = os.environ
) -> Countdown | None:
    """The end of the job that this process is part of; None outside of one, or where it is not known, with a notice.

    SLURM_JOB_END_TIME, which Slurm sets from 23.02 on, is by the controller's clock: where scontrol answers too, the
    earlier of the two ends counts.
    """
    job, given = SlurmJob.of(environment), environment.get(END, "").strip()
    if job is None:
        return None
    by_variable = int(given) - clock.wall() if re.fullmatch(r"[0-9]{1,15}", given) else 0.0
    try:
        left_s = job.left_s()
    except JobEndUnknown as reason:
        if by_variable <= 0:  # one that has passed is another job's, whose shell this is
            wrong = f", and {END} is {printable(given[:40])!r}" if given else ""
            told = f"the end of job {job.name} is not known: {reason}{wrong}"
            on_event(Notice(f"{told}; the run stops when a signal comes", "warning"))
            return None
        left_s = by_variable
    if by_variable > 0:
        left_s = min(left_s, by_variable)
    if math.isinf(left_s):
        return None
    return Countdown("the job's time limit", left_s, margin_s, clock, job)
