"""The signals that ask for a stop: SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, and their handler for a block."""

from __future__ import annotations

import contextlib
import signal
import threading
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


@contextlib.contextmanager
def noting_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came within the block: the first is only noted, a second one raises ``KeyboardInterrupt`` at once.

    For callers that have a program of their own. Nothing is handled in a thread, nor where SIGINT has another handler
    than Python's: then it never came. Afterwards the handler is what it was.
    """
    python = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not python:
        yield lambda: False
        return
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, python)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, python)
