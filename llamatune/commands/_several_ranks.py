"""A command that several processes (ranks) run: rank 0 prints, and all end together with one exit code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from llamatune.errors import EnvironmentFault
from llamatune.events import ShouldStop, never_stop
from llamatune.launch_variables import Launch, read_launch
from llamatune.stop_signals import stop_signals

if TYPE_CHECKING:
    from llamatune.ranks import Ranks

T = TypeVar("T")

_TIMEOUT_S = 600.0
_STOP_S = 3.0
_connected = False
"""Whether the ranks of this command have connected, so that each has heard of a fault of another."""
_told_of_stop: bool | None = None
"""Whether this process, before it connected, was the first to tell the others that it stops; None: it told nobody."""


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Tell the other ranks of a fault or stop that came before they connected: one reports it, all leave with its code.

    A stopped process waits for the others a few seconds only.
    """
    global _connected, _told_of_stop
    _connected, _told_of_stop = False, None
    try:
        yield
    except BaseException as fault:
        launch = None if _connected else _launch_or_none()
        if launch is not None and launch.world_size > 1:
            if isinstance(fault, Exception):
                with connect(launch):
                    raise
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch is imported

            from llamatune.rendezvous import report_stop

            _told_of_stop = report_stop(launch, _STOP_S)
        raise


def reports_stop() -> bool:
    """Whether this process says that a signal stopped it, as one of the ranks does."""
    launch = _launch_or_none()
    if launch is None or _connected or _told_of_stop is not None:
        return launch is None or _connected or bool(_told_of_stop)
    return launch.rank == 0


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
    from llamatune.process_group import connected

    device_type = "cpu" if launch.world_size == 1 else find_device(device).type
    _connected = launch.world_size > 1
    with connected(device_type, timeout_s, launch, should_stop) as ranks:
        yield ranks


def run_on_first(launch: Launch, work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0, while the others wait."""
    with connect(launch) as ranks:
        wait_for_first(ranks, work)


def wait_for_first(ranks: Ranks, work: Callable[[], T]) -> T | None:
    """What ``work`` returns on rank 0; the others wait for it and pass the signals that they get on to rank 0."""
    if ranks.is_first:
        result = work()
        ranks.wait()
        return result
    with stop_signals(lambda number, frame: ranks.ask_to_stop()):
        ranks.wait()
    return None
