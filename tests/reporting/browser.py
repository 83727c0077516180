"""A headless Chromium, spoken to over two pipes in the DevTools protocol: no port, no driver, no other package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One tab. ``events`` are all that the browser told of it since it was opened."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0)
        self._rest, self._numbers, self._session = b"", itertools.count(1), ""
        self.events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = self._answers.read(1 << 16)
            assert block, "the browser is gone"
            self._rest += block
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int, height: int, scheme: str = "light") -> None:
        """Load a file in a window of so many pixels, under the ``light`` or ``dark`` scheme."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self._send("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def print_in(self, width: int) -> None:
        """Lay the page out as on paper, of so many pixels beside the margins."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self._send("Emulation.setEmulatedMedia", media="print")

    def print_normally(self) -> None:
        """Undo ``print_in``."""
        self._send("Emulation.setEmulatedMedia", media="")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; the page's own policy does not bind the tester."""
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def requests(self) -> list[str]:
        """Every address that was asked for; what the page holds itself has none."""
        sent = (event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent")
        asked = (parameters["request"]["url"] for parameters in sent)
        return [url for url in asked if not url.startswith("data:")]

    def complaints(self) -> list[dict[str, Any]]:
        """What stands in the console."""
        told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for event in self.events if event.get("method") in told]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile, for the length of a block."""
    assert CHROMIUM is not None
    (listens, commands), (answers, speaks) = os.pipe(), os.pipe()
    # Out of the way of 3 and 4, which the browser uses.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (listens, speaks)]

    def wire() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        close_fds=False, preexec_fn=wire, start_new_session=True,
    )  # fmt: skip
    for end in (listens, speaks, *ends):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
