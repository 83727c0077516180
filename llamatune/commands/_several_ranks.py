"""A command that several processes (ranks) run: rank 0 prints, and all end together with one exit code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llamatune.errors import EnvironmentFault
from llamatune.events import ShouldStop, never_stop
from llamatune.launcher import Launch, read_launch
from llamatune.stop_signals import stop_signals

if TYPE_CHECKING:
    from llamatune.ranks import Ranks

_TIMEOUT_S = 600.0
_connected = False
"""Whether the ranks of this command have connected, so that each has heard of a fault of another."""


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Tell the other ranks of a fault that came before they connected: one reports it, all leave with its code."""
    global _connected
    _connected = False
    try:
        yield
    except Exception:
        if not _connected and (launch := _launch_or_none()) and launch.world_size > 1:
            with connect(launch):
                raise
        raise


def reports_stop() -> bool:
    """Whether this process says that a signal stopped it. Before ranks connect, rank 0 does: launchers signal all."""
    launch = _launch_or_none()
    return launch is None or launch.rank == 0 or _connected


def _launch_or_none() -> Launch | None:
    """The launch, None where its variables are wrong."""
    with contextlib.suppress(EnvironmentFault):
        return read_launch()
    return None


@contextlib.contextmanager
def connect(
    launch: Launch, device: str = "cpu", timeout_s: float = _TIMEOUT_S, should_stop: ShouldStop = never_stop
) -> Iterator[Ranks]:
    """The connected ranks of ``launch``, which send each other tensors of ``device`` (as in the spec)."""
    global _connected
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch is imported

    from llamatune.devices import find_device
    from llamatune.ranks import connected

    device_type = "cpu" if launch.world_size == 1 else find_device(device).type
    _connected = launch.world_size > 1
    with connected(device_type, timeout_s, launch, should_stop) as ranks:
        yield ranks


def run_on_first(launch: Launch, work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0, while the others wait and pass the signals that they get on to it."""
    with connect(launch) as ranks:
        if ranks.is_first:
            work()
            ranks.wait()
        else:
            with stop_signals(lambda number, frame: ranks.ask_to_stop()):
                ranks.wait()
