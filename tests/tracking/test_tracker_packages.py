"""What TensorBoard's and W&B's own packages make of a run that was killed and went on."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import StopAfter, make_spec, metrics, spec_values
from slow_cases import slow

from llamatune.errors import Stopped
from llamatune.tracking.trackers import Trackers, scalars
from llamatune.training.train import train

KEY = "5ec2e7" * 6 + "abcd"
SETTINGS = {"training__max_steps": 18, "training__save_every_steps": 7, "evaluation__every_steps": 5}


def _points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as the run's log has it."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run):
        for name, value in scalars(line).items():
            curves.setdefault(name, []).append((line["step"], value))
    return curves


def test_tensorboard_reads_each_step_once(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """One TensorBoard has been looking since the first process, another comes when all is done."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, run = prepared(validation_fraction=0.25, seed=3), tmp_path / "run"
    spec = make_spec(tiny_base(), data, run, training__num_epochs=3, tracking={"tensorboard": True})
    everything = {"scalars": 0}
    stop = StopAfter(6)
    with pytest.raises(Stopped), Trackers(spec, stop.on_event) as tracking:
        train(spec, on_event=tracking.on_event, should_stop=stop.should_stop)
    watching = EventAccumulator(str(run / "tensorboard"), everything)
    watching.Reload()
    early = [event.step for event in watching.Scalars("train/loss")]
    with Trackers(spec, lambda event: None) as tracking:
        train(spec, on_event=tracking.on_event)
    watching.Reload()
    fresh = EventAccumulator(str(run / "tensorboard"), everything)
    fresh.Reload()
    expected = _points(run)
    assert len(expected["train/loss"]) == 9
    assert early == [1, 2, 3, 4]
    for reader in (watching, fresh):
        assert set(reader.Tags()["scalars"]) == set(expected)
        for name, points in expected.items():
            found = [(event.step, event.value) for event in reader.Scalars(name)]
            assert [step for step, _ in found] == [step for step, _ in points], name
            assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-6)
    times = [event.wall_time for event in fresh.Scalars("train/loss")]
    assert times == sorted(times)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """A server that accepts and never answers; all that W&B may want to reach leads there. Logged in by a key."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, address)
        for name in ("NO_PROXY", "no_proxy", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield server


@pytest.fixture
def spec_file(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        data, path = prepared(validation_fraction=0.25, seed=3), tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(spec_values(tiny_base(), data, tmp_path / "run", **changes)))
        return path

    return write


_CHILD = """
import time
from pathlib import Path
import llamatune.tracking.trackers as trackers
import llamatune.tracking.weights_and_biases as tracker
from llamatune.cli import main
from llamatune.formats.metrics import MetricsLog

def append(self, record, append=MetricsLog.append):
    append(self, record)
    while getattr(record, "step", None) == {step} and not Path("gate").exists():
        time.sleep(0.01)

MetricsLog.append = append
tracker._INIT_S = tracker._FINISH_S = {patience_s}
trackers._CLOSING_S = {closing_s}
main(["train", "run.yaml", "--json"])
"""


def _start(spec: Path, step: int = -1, patience_s: float = 20, closing_s: float = 60) -> subprocess.Popen[str]:
    """A run that goes no further than ``step`` until there is a file called gate."""
    code = _CHILD.format(step=step, patience_s=patience_s, closing_s=closing_s)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=spec.parent
    )


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it never came to that: {process.communicate()}")
        time.sleep(0.01)


def _logged(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()


def _wandb_records(path: Path) -> list[Any]:
    """The records of an offline file: LevelDB's log format, 32 KiB blocks, below a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, pieces, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        pieces += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


def _wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]


def _accepted(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _texts(*places: Path) -> Iterator[bytes]:
    yield from (path.read_bytes() for place in places for path in place.rglob("*") if path.is_file())


def test_wandb_offline_has_each_step_once_sends_nothing_and_keeps_no_secret(
    spec_file: Callable[..., Path], tmp_path: Path, nowhere: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")  # the spec decides
    spec, run = spec_file(**SETTINGS, tracking={"wandb": "offline", "wandb_project": "llamas"}), tmp_path / "run"
    process = _start(spec, step=12)
    _wait_until(lambda: _logged(run, 12) and any(run.glob("wandb/offline-run-*/*.wandb")), process)
    process.kill()
    process.communicate()
    process = _start(spec)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "warning" not in stderr
    assert all("=" in line for line in stderr.splitlines()), "W&B speaks too"

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    records = _wandb_records(file)
    identity = (run / "wandb" / "run-id").read_text()
    (told,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (told.run_id, told.project, told.display_name) == (identity, "llamas", "run")
    assert json.loads({entry.key: entry.value_json for entry in told.config.update}["lora"])["r"] == 4
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in _wandb_rows(records):
        for name in [name for name in row if "/" in name]:
            curves.setdefault(name, []).append((row["_step"], row[name]))
    assert curves == _points(run)
    assert len(curves["train/loss"]) == 18

    assert not _accepted(nowhere), "something was sent"
    assert not any(KEY.encode() in text for text in _texts(run, tmp_path / "home"))
    assert KEY not in stdout + stderr


def test_wandb_online_is_offline_where_the_environment_says_so(
    spec_file: Callable[..., Path], tmp_path: Path, nowhere: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the batch script that ``llamatune slurm`` writes."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = _start(spec_file(tracking={"wandb": "online"}))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "warning" not in stderr
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == 1
    assert not _accepted(nowhere), "something was sent"


@pytest.mark.parametrize("closing_s", [slow(60), 0])
def test_wandb_that_loses_its_service_costs_one_warning(
    spec_file: Callable[..., Path], tmp_path: Path, nowhere: socket.socket, closing_s: int
) -> None:
    """Its own process is killed in the middle of the run, which waits for the tracker in the end or does not."""
    pytest.importorskip("wandb")
    spec, run = spec_file(**SETTINGS, tracking={"wandb": "offline"}), tmp_path / "run"
    process = _start(spec, step=5, closing_s=closing_s)
    _wait_until(lambda: _logged(run, 5) and any(run.glob("wandb/offline-run-*/*.wandb")), process)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    numbers = [int(number) for listing in children for number in listing.read_text().split()]
    services = [number for number in numbers if b"wandb-core" in Path(f"/proc/{number}/cmdline").read_bytes()]
    assert services
    for number in services:
        os.kill(number, signal.SIGKILL)
    (tmp_path / "gate").touch()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["steps"] == 18
    assert sum(" warning: no longer tracking with W&B: " in line for line in stderr.splitlines()) == 1
    assert "Traceback" not in stderr


def test_wandb_online_without_a_network_costs_one_warning(
    spec_file: Callable[..., Path], tmp_path: Path, nowhere: socket.socket
) -> None:
    pytest.importorskip("wandb")
    process = _start(spec_file(tracking={"wandb": "online"}), patience_s=2)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["steps"] == 3
    (warning,) = [line for line in stderr.splitlines() if " warning: " in line]
    assert warning.partition(" ")[2].startswith("warning: no longer tracking with W&B: ")
    assert _accepted(nowhere)
    assert KEY not in stdout + stderr
    assert not any(KEY.encode() in text for text in _texts(tmp_path / "run", tmp_path / "home"))
    assert "Traceback" not in stderr


def test_wandb_online_without_a_login_says_so_and_does_not_ask(
    spec_file: Callable[..., Path], tmp_path: Path, nowhere: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, where W&B would ask for a key."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    code = (
        "import pathlib, sys; from llamatune.spec import load_spec; "
        "from llamatune.tracking.weights_and_biases import WandbTracker; "
        f"WandbTracker(load_spec(pathlib.Path({str(spec_file(tracking={'wandb': 'online'}))!r})), pathlib.Path('.'))"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, timeout=60
    )
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 1
    assert said.strip().endswith("PermissionError: not logged in: run `wandb login`, or set tracking.wandb: offline")
    assert "Enter" not in said
    assert not _accepted(nowhere)
