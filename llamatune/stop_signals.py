"""The signals that ask for a stop: SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, and their handler for a block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


Handler = Callable[[int, FrameType | None], None]


def handle_stop_signals(handler: Handler | signal.Handlers) -> None:
    """Give ``handler`` the signals that ask for a stop, from now on; what the caller ignores stays ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_signals(handler: Handler) -> Iterator[None]:
    """Within the block ``handler`` gets the signals that ask for a stop.

    A signal that the caller ignores (nohup, a background job of a shell) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        handle_stop_signals(handler)
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
