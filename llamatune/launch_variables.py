"""The launch of several processes (ranks) by srun, torchrun or another launcher: rank, world size, address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamatune.errors import EnvironmentFault

_STEP_TASKS = "SLURM_STEP_NUM_TASKS"
_MPI = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}

_SAME_IN_A_STEP = {_STEP_TASKS: "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE": "SLURM_TASKS_PER_NODE"}
"""srun sets both of each pair alike; sbatch sets the second alone, SLURM_NTASKS only where it was given a number."""

_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections (32,768 and up)."""


@dataclass(frozen=True)
class Launch:
    """How this process was started: as ``rank`` of ``world_size``, ``local_rank`` on its node.

    Ranks find each other at ``address`` and ``port``, where rank 0 listens.
    """

    launcher: str = "alone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes; one process where no launcher says otherwise.

    torchrun comes first, since srun may start one torchrun on each node.

    Raises:
        EnvironmentFault: a variable is missing or no number, the variables contradict each other, or the launcher
            (mpirun) gives no address to meet at.
    """
    step_tasks = 1 if _inherited_from_another_step(environment) else _count(environment, _STEP_TASKS)
    world_size = _count(environment, "WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in environment:
        if world_size < step_tasks:
            raise EnvironmentFault(
                f"srun started {step_tasks} processes, but torchrun made worlds of {world_size}",
                "WORLD_SIZE",
                "start llamatune by srun alone, or one torchrun a node with --nnodes and --rdzv-endpoint",
            )
        return _from_variables(environment, "torchrun", world_size)
    if step_tasks > 1:
        return _from_slurm(environment, step_tasks)
    for variable, launcher in _MPI.items():
        if _count(environment, variable) > 1 and world_size == 1 and not _inherited_from_another_step(environment):
            raise EnvironmentFault(
                f"{launcher} started {_count(environment, variable)} processes and gives them no address to meet at",
                variable,
                "start llamatune by srun or torchrun",
            )
    return _from_variables(environment, "a launcher", world_size)


def _from_variables(environment: Mapping[str, str], launcher: str, world_size: int) -> Launch:
    """From RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun and others set."""
    if world_size == 1:
        return Launch()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()]
    if missing:
        raise EnvironmentFault(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set",
            "WORLD_SIZE",
            "start llamatune by torchrun or srun, or unset WORLD_SIZE for one process",
        )
    rank = _number(environment, "RANK", range(world_size))
    local_rank = _number(environment, "LOCAL_RANK", range(world_size), default=rank)
    return Launch(launcher, rank, world_size, local_rank, _address(environment), _port(environment))


def _from_slurm(environment: Mapping[str, str], world_size: int) -> Launch:
    """From the variables of a task that srun started; MASTER_ADDR and MASTER_PORT take precedence where they are set.

    Tasks of one node meet on its loopback address, those of several at the first node of the step.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    alone = _count(environment, "SLURM_STEP_NUM_NODES") == 1
    address = _address(environment) or ("127.0.0.1" if alone else first_node(nodes))
    if environment.get("MASTER_PORT"):
        port = _port(environment)
    else:  # a function of the step, so that every task knows it and two steps on a node differ
        job, step = (_number(environment, name, range(2**32), default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = _PORTS[(job * 127 + step) % len(_PORTS)]
    rank = _number(environment, "SLURM_PROCID", range(world_size))
    return Launch(
        "srun", rank, world_size, _number(environment, "SLURM_LOCALID", range(world_size), default=rank), address, port
    )


def first_node(nodes: str) -> str:
    """The first host of Slurm's compact list: ``gpu[03-05,7],login1`` gives ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _inherited_from_another_step(environment: Mapping[str, str]) -> bool:
    """Whether the step's variables come from sbatch, called inside a step of another job."""
    pairs = [(environment.get(step), environment.get(job)) for step, job in _SAME_IN_A_STEP.items()]
    return _count(environment, _STEP_TASKS) > 1 and any(step and job and step != job for step, job in pairs)


def _count(environment: Mapping[str, str], variable: str) -> int:
    """A variable's number of processes, at least 1. An empty one counts as unset."""
    return _number(environment, variable, range(1, 10**9), default=1)


def _address(environment: Mapping[str, str]) -> str:
    """An IPv6 address is passed on without its brackets."""
    return environment.get("MASTER_ADDR", "").strip().removeprefix("[").removesuffix("]")


def _port(environment: Mapping[str, str]) -> int:
    return _number(environment, "MASTER_PORT", range(1, 65_536))


def _number(environment: Mapping[str, str], variable: str, allowed: range, default: int | None = None) -> int:
    text = environment.get(variable, "").strip()
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) not in allowed:
        raise EnvironmentFault(
            f"{text[:40]!r} is not a number from {allowed[0]} to {allowed[-1]:,}",
            variable,
            "unset it, or start llamatune by srun or torchrun",
        )
    return int(text)
