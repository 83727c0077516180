"""Starts a command as several ranks, and tells how each of them ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import Ended, Running, Warm

ADDRESS = "127.0.0.1"
_EVENT = re.compile(r"(\d{4}-\d\d-\d\dT[\d:]+ )?(info: |warning: |(\w+ )*\w+=)")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        return int(listener.getsockname()[1])


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes; nothing for a process on its own."""
    if size == 1:
        return {}
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(port)}


@dataclass(frozen=True)
class EndOfAll:
    """By rank: exit codes, and lines on stdout and stderr."""

    ranks: list[Ended]

    @property
    def codes(self) -> list[int]:
        return [ended.code for ended in self.ranks]

    @property
    def printed(self) -> list[str]:
        return [line for ended in self.ranks for line in ended.stdout.splitlines()]

    @property
    def said(self) -> list[str]:
        return [line for ended in self.ranks for line in ended.stderr.splitlines()]

    @property
    def errors(self) -> list[str]:
        """Everything on stderr that is no event of the run: what ended it, and noise of libraries."""
        return [line for line in self.said if not _EVENT.match(line)]


@dataclass(frozen=True)
class Launched:
    """The processes of one launch, by rank."""

    warm: Warm
    processes: list[Running]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def still_run(self) -> bool:
        return not any(process.ended_within(0) for process in self.processes)

    def ended(self, limit_s: float = 60) -> EndOfAll:
        """Wait for all. Whoever has not ended by then is killed, which its exit code tells."""
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            if not process.ended_within(max(0.0, deadline - time.monotonic())):
                os.kill(process.pid, signal.SIGKILL)
        return EndOfAll([self.warm.finish(process) for process in self.processes])


def launch(warm: Warm, arguments: Sequence[str], size: int, own: dict[int, Any] | None = None, **how: Any) -> Launched:
    """Start a command on ``size`` ranks. ``how`` as in ``Warm.start``, and ``own[rank]`` for one rank alone."""
    port, started = free_port(), []
    for rank in range(size):
        options: dict[str, Any] = {"arguments": list(arguments), **how, **(own or {}).get(rank, {})}
        options["environment"] = {**rank_variables(rank, size, port), **options.get("environment", {})}
        started.append(warm.start(**options))
    return Launched(warm, started)


def run_ranks(warm: Warm, arguments: Sequence[str], size: int, **how: Any) -> EndOfAll:
    """A launch that must succeed: rank 0 prints the one result, the others nothing."""
    end = launch(warm, arguments, size, **how).ended()
    assert (end.codes, end.errors, len(end.printed)) == ([0] * size, [], 1), end
    assert end.ranks[0].stdout
    assert not any(ended.stdout or ended.stderr for ended in end.ranks[1:])
    return end


def wait_for(path: Path, text: str, launched: Launched, limit_s: float = 60) -> None:
    """Return when a file holds ``text``."""
    deadline = time.monotonic() + limit_s
    while not (path.is_file() and text in path.read_text()):
        assert launched.still_run(), launched.ended(1)
        assert time.monotonic() < deadline, launched.ended(0)
        time.sleep(0.005)
