"""Output and signals of a verb: progress and messages go to stderr, the result to stdout."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from llamatune.errors import EnvironmentFault
from llamatune.stop_signals import handle_stop_signals
from llamatune.strict_json import json_line

if TYPE_CHECKING:
    import rich.console

    from llamatune.events import Event

    RichConsole = rich.console.Console
else:
    RichConsole = Any  # rich is loaded when something is printed


@contextlib.contextmanager
def faults_of_stdout() -> Iterator[None]:
    """Name standard output in the error of a write to it, as of a full disk that it was redirected to."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as fault:
        todo = (
            "free some space" if fault.errno in (errno.ENOSPC, errno.EDQUOT) else "redirect it to what can be written"
        )
        raise EnvironmentFault(f"cannot write: {fault.strerror or fault}", "standard output", todo) from fault


class Console:
    """Prints for one verb and, from the begin of a ``with`` block on, handles signals: after it they change nothing.

    A signal only sets a flag, which ``should_stop`` returns; the work ends at its next safe point. Of several ranks,
    only the first has a console that ``prints``. Without ``has_stdout``, which an output file has instead, there is no
    result.
    """

    def __init__(self, json_mode: bool, prints: bool = True, has_stdout: bool = True) -> None:
        self.log_every_steps = 1
        self._prints, self._has_stdout = prints, has_stdout
        self._json_mode = json_mode
        self._stop = False
        self._draw: Callable[[Event], None] | None = None
        self._close_drawing: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        handle_stop_signals(self._note_signal)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close_drawing()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    @property
    def prints_json(self) -> bool:
        return self._json_mode

    def should_stop(self) -> bool:
        return self._stop

    def on_event(self, event: Event) -> None:
        """Draw an event on a terminal, or write it as a ``key=value`` line. Work goes on where stderr is closed."""
        if not self._prints:
            return
        if self._draw is None:
            if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
                from llamatune.commands._progress_bars import ProgressBars, open_console

                live = ProgressBars(open_console(sys.stderr))
                self._draw, self._close_drawing = live.draw, live.close
            else:
                from llamatune.commands._log_lines import KeyValueLines

                self._draw = KeyValueLines(self.log_every_steps).draw
        try:
            self._draw(event)
        except (OSError, ValueError):  # a pipe that was closed, a file object that was
            self._draw = lambda event: None

    def result(self, payload: dict[str, Any], human: Callable[[RichConsole], None]) -> None:
        """Print the result: ``payload`` as one JSON object under ``--json``, else what ``human`` prints."""
        if not self._prints:
            return
        self._close_drawing()
        if not self._has_stdout:
            return
        with contextlib.suppress(BrokenPipeError), faults_of_stdout():  # the reader may close a pipe
            if self._json_mode:
                sys.stdout.write(json_line(payload))
            else:
                from llamatune.commands._progress_bars import open_console

                human(open_console(sys.stdout))
            sys.stdout.flush()
