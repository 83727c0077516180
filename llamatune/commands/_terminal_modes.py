"""Modes of the terminal while a panel is drawn on it: keys are not echoed, and Ctrl-C discards nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Callable
from typing import IO

_LOCAL_FLAGS = 3  # of what tcgetattr returns
_CHANGED = termios.ECHO | termios.ECHOCTL | termios.NOFLSH


def silence_keys(file: IO[str]) -> Callable[[], None]:
    """Keep keys from moving the cursor that a drawing counts on; what restores the terminal.

    Nothing is echoed: ``^C`` would stand anywhere in the drawing, within a character too. The terminal gets what was
    written before Ctrl-C was pressed (NOFLSH). What is typed is there for the shell afterwards. A process in the
    background leaves the terminal alone, which is another's then.
    """
    try:
        descriptor = file.fileno()
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return lambda: None
        flags = termios.tcgetattr(descriptor)[_LOCAL_FLAGS]
        _set_flags(descriptor, flags & ~termios.ECHO & ~termios.ECHOCTL | termios.NOFLSH)
    except (OSError, ValueError, termios.error):  # no terminal, or not this process's
        return lambda: None

    def restore() -> None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            _set_flags(descriptor, flags)

    return restore


def _set_flags(descriptor: int, flags: int) -> None:
    """Set the changed flags as in ``flags``. SIGTTOU would stop a process that has gone to the background."""
    modes = termios.tcgetattr(descriptor)
    modes[_LOCAL_FLAGS] = modes[_LOCAL_FLAGS] & ~_CHANGED | flags & _CHANGED
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
