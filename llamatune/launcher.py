"""Refusal of several processes (ranks) under srun, torchrun or mpirun: each would do all of the work."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from llamatune.errors import EnvironmentFault

_SRUN, _PMI, _WORLD = "SLURM_STEP_NUM_TASKS", "PMI_SIZE", "WORLD_SIZE"
_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "start one: mpirun -n 1"),
    _SRUN: ("srun", "start one: srun --ntasks=1"),
    _PMI: ("mpirun", "start one: mpirun -n 1"),
    _WORLD: ("a launcher", "start one, or unset WORLD_SIZE where no launcher set it"),
}
"""The launcher that sets each variable, and the remedy; srun can set PMI_SIZE too, so its own variable comes first."""

_SAME_IN_A_STEP = {_SRUN: "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE": "SLURM_TASKS_PER_NODE"}
"""srun sets both of each pair alike; sbatch sets the second alone, SLURM_NTASKS only where it was given a number."""


def refuse_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise if this process is one of several.

    Raises:
        EnvironmentFault: a launcher started several, or a count of processes is no number.
    """
    inherited = _of_an_outer_step(environment)
    for variable, (launcher, remedy) in _LAUNCHERS.items():
        count = 1 if variable in inherited else _count(environment, variable)
        if variable == _WORLD and "TORCHELASTIC_RUN_ID" in environment:
            launcher, remedy = "torchrun", "start one, without torchrun"
        if count > 1:
            what = f"{launcher} started {count} processes, and llamatune works in one"
            raise EnvironmentFault(what, variable, remedy)


def _of_an_outer_step(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variables to ignore: those that a job inherited because sbatch was called inside a step of another job."""
    pairs = [(environment.get(step), environment.get(job)) for step, job in _SAME_IN_A_STEP.items()]
    if _count(environment, _SRUN) > 1 and any(step and job and step != job for step, job in pairs):
        return _SRUN, _PMI
    return ()


def _count(environment: Mapping[str, str], variable: str) -> int:
    """A variable's number of processes. An empty one counts as unset."""
    text = environment.get(variable, "").strip()
    if text and not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        todo = "unset it, or set it to 1 for one process"
        raise EnvironmentFault(f"{text[:40]!r} is not a number of processes", variable, todo)
    return int(text or 1)
