"""Entry point of ``llamatune`` and ``python -m llamatune``: handlers of the stop signals, then the command line."""

from __future__ import annotations

import signal
from types import FrameType

from llamatune.stop_signals import handle_stop_signals

_noted: list[int] = []


def _note(number: int, frame: FrameType | None) -> None:
    """Keep a signal that comes while the command line is imported, for ``cli.main``; one at the end changes nothing."""
    _noted.append(number)


# Before anything else is imported: Python's own handlers end in a traceback or in death by the signal.
handle_stop_signals(_note)


def main() -> None:
    """Run one command and exit with its code."""
    from llamatune.cli import main as run

    try:
        run(stopped_before=lambda: bool(_noted))
    finally:  # Python takes its handlers away before its last writes; what is ignored stays ignored
        handle_stop_signals(signal.SIG_IGN)


if __name__ == "__main__":
    main()
