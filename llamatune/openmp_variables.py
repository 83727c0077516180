"""Environment variables of OpenMP: checked numbers of threads, how threads wait, where they are bound. No torch."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from llamatune.errors import EnvironmentFault

SPINS = 30_000
"""Turns of the loop in which a thread waits for others before it sleeps, a tenth of OpenMP's own number.

On idle cores steps take as long as with OpenMP's own number, within the noise of 14 %; without any (``passive``) small
steps take half as long again. Beside processes that take the cores, a step of OpenMP's own number took more than 20
times as long as on one thread, of this number 2.5 times, of ``passive`` as long. The figures are in
``docs/performance.md``.
"""

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user sets torch's number of threads."""

_COUNT = r"\s*\+?0*[1-9][0-9]{0,8}\s*"
_COUNTS = re.compile(rf"{_COUNT}(,{_COUNT})*", re.ASCII)
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_LOAD = Path("/proc/loadavg")


def prepare_openmp() -> None:
    """``set_openmp_variables`` in this process, unless torch is loaded, which has read them."""
    if "torch" not in sys.modules:
        set_openmp_variables(os.environ)


def set_openmp_variables(environment: MutableMapping[str, str]) -> None:
    """Check how many threads the user wants, and say how they wait unless the user did.

    An empty number is taken away: it stands for none, and OpenMP complains of it in lines of its own.

    Raises:
        EnvironmentFault: a number is none. OpenMP would complain and take another, MKL would take one in silence.
    """
    for name in THREAD_COUNTS:
        text = environment.get(name)
        if text is not None and not text.strip():
            del environment[name]
        elif text is not None and not _COUNTS.fullmatch(text):
            raise EnvironmentFault(f"{text[:80]!r} is no number of threads", name, "set it to one, or unset it")
    if not any(name in environment for name in _WAITING):
        name, value = ("OMP_WAIT_POLICY", "passive") if _others_take_the_cores() else ("GOMP_SPINCOUNT", str(SPINS))
        environment[name] = value


def waiting_asleep(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process with fewer cores than threads: one that waits for others sleeps at once.

    None is bound to a core that the process leaves to others.
    """
    kept = {name: value for name, value in environment.items() if name not in (*_WAITING, *_PLACES)}
    return {**kept, "OMP_WAIT_POLICY": "passive"}


def _others_take_the_cores() -> bool:
    """Whether as many other threads want to run as the machine has cores: the least of three looks, 1 ms apart.

    The average load is no measure of it: that of the last minute is often that of this user's last command.
    """
    runnable = []
    for pause_s in (0.0, 0.001, 0.001):
        time.sleep(pause_s)
        try:
            running = _LOAD.read_text(encoding="ascii").split()[3]
            runnable.append(int(running.partition("/")[0]) - 1)  # this thread runs while it looks
        except (OSError, ValueError, IndexError):  # no Linux
            return False
    return min(runnable) >= (os.cpu_count() or 1)
