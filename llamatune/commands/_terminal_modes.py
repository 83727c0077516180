"""Modes of the terminal while something is drawn on it: Ctrl-C neither echoes nor discards what was written."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Callable
from typing import IO

_LOCAL_FLAGS = 3  # of what tcgetattr returns


def keep_cursor(file: IO[str]) -> Callable[[], None]:
    """Keep Ctrl-C from moving the cursor that a drawing counts on; what restores the terminal.

    ``^C`` is not echoed (ECHOCTL), and the terminal gets what was written before the key was pressed (NOFLSH): part of
    a drawing would be lost. A process in the background leaves the terminal alone, which is another's then.
    """
    try:
        descriptor = file.fileno()
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return lambda: None
        flags = termios.tcgetattr(descriptor)[_LOCAL_FLAGS]
        _set_flags(descriptor, flags & ~termios.ECHOCTL | termios.NOFLSH)
    except (OSError, ValueError, termios.error):  # no terminal, or not this process's
        return lambda: None

    def restore() -> None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            _set_flags(descriptor, flags)

    return restore


def _set_flags(descriptor: int, flags: int) -> None:
    """Set the two flags as in ``flags``. SIGTTOU would stop a process that has gone to the background."""
    modes, changed = termios.tcgetattr(descriptor), termios.ECHOCTL | termios.NOFLSH
    modes[_LOCAL_FLAGS] = modes[_LOCAL_FLAGS] & ~changed | flags & changed
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
