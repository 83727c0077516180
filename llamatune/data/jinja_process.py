"""The process in which a chat template from elsewhere is rendered, under limits that the system keeps.

A template is a program: it can loop for ever, ask for any amount of memory, or look for a hole in the sandbox. So it
runs in a process without files, with bounded memory, whose renderings have a bounded processor time; its answers are
JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import weakref
from collections.abc import Mapping
from typing import Any

from llamatune.child_process import end_child, start_child
from llamatune.data.jinja_engine import LARGEST_OUTPUT, SECONDS, Broken, Refused

_PATIENCE_S = 120.0
"""For an answer; beyond the limit on processor time, for a machine that is busy."""
_LARGEST_ANSWER = 6 * LARGEST_OUTPUT + (1 << 20)


class Stuck(Exception):
    """The process has ended or does not answer: the template is beyond its limits."""


class JinjaProcess:
    """A compiled template in a process of its own, which ends with this object. Arguments are those of ``Engine``.

    Raises:
        Broken: the template cannot be compiled.
        Stuck: compiling it took too long, or ended the process.
        EnvironmentFault: the process cannot be started.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: str | None) -> None:
        self._child, self._connection = start_child("llamatune.data.jinja_engine", silent=True)
        self._end = weakref.finalize(self, end_child, self._child, self._connection)
        self._ask([source, dict(variables), now])

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply of the engine; raises what it raises, or ``Stuck``."""
        return self._ask(request)

    def _ask(self, request: object) -> dict[str, Any]:
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            if not self._connection.poll(_PATIENCE_S):
                raise Stuck(f"it gives no answer within {_PATIENCE_S:.0f} s")
            reply = json.loads(self._connection.recv_bytes(_LARGEST_ANSWER))
        except (OSError, EOFError, ValueError):
            raise Stuck(self._how_it_ended()) from None
        if not isinstance(reply, dict):
            raise Stuck("its process gave another answer than was asked for")
        if "refused" in reply:
            raise Refused(str(reply["refused"]))
        if "broken" in reply:
            raise Broken(str(reply["broken"]))
        return reply

    def _how_it_ended(self) -> str:
        try:
            code = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its answer cannot be read"
        if code == -signal.SIGPROF:
            return f"it takes more than {SECONDS} s of processor time"
        return f"the process that renders it has died (exit status {code})"
