"""Ranks: what they send each other arrives; when one fails, all leave with its code and one line, in bounded time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from slow_cases import slow

SCRIPT = Path(__file__).with_name("rank_process.py")
TIMEOUT_S = 4.0
VANISHED = "another rank ended, or did not answer in time"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(
    rank: int, size: int, port: int, case: str, where: Path, address: str = "127.0.0.1", inside: Sequence[str] = ()
) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [*inside, sys.executable, str(SCRIPT), case, str(TIMEOUT_S)],
        env={**os.environ, **variables, "PYTHONPATH": str(SCRIPT.parents[1])},
        cwd=where, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines of all on stderr."""
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], [line for text in outputs for line in text.splitlines()]


def run(case: str, where: Path, size: int = 3) -> tuple[list[int], list[str]]:
    port = free_port()
    return ended([start(rank, size, port, case, where) for rank in range(size)])


@pytest.mark.parametrize("case", ["send", "slow"])
def test_all_goes_well(case: str, tmp_path: Path) -> None:
    assert run(case, tmp_path) == ([0, 0, 0], [])


@pytest.mark.parametrize(
    ("case", "codes", "line"),
    [
        ("error-0", [4, 4, 4], "error: a bad file: here: mend it"),
        slow("error-2", [4, 4, 4], "error: a bad file: here: mend it"),
        ("everywhere", [6, 6, 6], "error: not finite"),
        slow("memory-1", [5, 5, 5], "error: out of memory"),
        slow("kill-0", [-9, 5, 5], VANISHED),
        ("kill-1", [5, -9, 5], VANISHED),
    ],
)
def test_one_rank_speaks_and_all_leave_with_its_code(case: str, codes: list[int], line: str, tmp_path: Path) -> None:
    started = time.monotonic()
    seen, lines = run(case, tmp_path)
    assert (seen, len(lines)) == (codes, 1), lines
    assert line in lines[0]
    assert time.monotonic() - started < 45


@pytest.mark.parametrize(
    ("case", "rank", "line"),
    [
        ("stop", 0, VANISHED),
        slow("stop", 1, VANISHED),
        ("freeze", 0, VANISHED),
        ("freeze", 1, VANISHED),
        slow("freeze", 2, VANISHED),
        ("connect", 0, "the ranks cannot connect to each other"),
        ("connect", 1, "the ranks cannot connect to each other"),
        slow("connect", 2, "the ranks cannot connect to each other"),
    ],
)
def test_a_stopped_rank_is_noticed_within_the_timeout(case: str, rank: int, line: str, tmp_path: Path) -> None:
    """While the others compute, while they only wait, as for one that saves, and while they connect."""
    port = free_port()
    processes = [start(number, 3, port, f"{case}-{rank}", tmp_path) for number in range(3)]
    try:
        others = [process for number, process in enumerate(processes) if number != rank]
        codes, lines = ended(others)
        assert (codes, len(lines)) == ([5, 5], 1), lines
        assert line in lines[0]
    finally:
        processes[rank].send_signal(signal.SIGKILL)
        processes[rank].communicate()


@pytest.mark.parametrize("absent", [slow(0), 1])
def test_a_rank_that_does_not_start(absent: int, tmp_path: Path) -> None:
    port = free_port()
    codes, lines = ended([start(rank, 3, port, "send", tmp_path) for rank in range(3) if rank != absent])
    assert (codes, len(lines)) == ([5, 5], 1), lines
    assert ("found no rank 0" if absent == 0 else "rank 1 of 3 did not start within 4 s") in lines[0]


def test_a_port_in_use_is_one_line_from_rank_0(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        codes, lines = ended([start(0, 2, taken.getsockname()[1], "send", tmp_path)])
    assert (codes, len(lines)) == ([5], 1), lines
    assert "the port is in use" in lines[0]
    assert "set MASTER_PORT" in lines[0]


def test_an_interface_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    codes, lines = run("send", tmp_path)
    assert (codes, len(lines)) == ([5, 5, 5], 1), lines
    assert "the ranks cannot connect to each other by GLOO_SOCKET_IFNAME=ib0 (" in lines[0]


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces that reach each other at 10.9.0.1 and 10.9.0.2."""
    names = [f"ranks-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*words: str) -> int:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode

    if os.getuid() or shutil.which("ip") is None or any(ip("netns", "add", name) for name in names):
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("link", "add", "one", "netns", names[0], "type", "veth", "peer", "name", "two", "netns", names[1])
        for number, (name, link) in enumerate(zip(names, ("one", "two"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.9.0.{number}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_an_interface_that_reaches_no_other_node_is_one_line(
    two_hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    processes = [
        start(rank, 2, 29500, "send", tmp_path, "10.9.0.1", ["ip", "netns", "exec", host])
        for rank, host in enumerate(two_hosts)
    ]
    codes, lines = ended(processes)
    assert (codes, len(lines)) == ([5, 5], 1), lines
    assert "by GLOO_SOCKET_IFNAME=lo (" in lines[0]
    assert "/gloo/" not in lines[0]


def test_two_world_sizes_are_refused(tmp_path: Path) -> None:
    port = free_port()
    processes = [start(0, 2, port, "send", tmp_path), start(1, 3, port, "send", tmp_path)]
    codes, lines = ended(processes)
    assert codes == [5, 5]
    assert 1 <= len(lines) <= 2
