"""Energy, power and memory of a GPU during a run, from a stand-in for NVML's GPU, and where they are recorded."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_tools import StopAfter, last_checkpoint, make_spec, run_and_record

from llamatune.errors import Stopped
from llamatune.events import Notice
from llamatune.ranks import ALONE, Ranks
from llamatune.training import gpu_meter, run_summary, save_and_resume
from llamatune.training import train as train_module
from llamatune.training.gpu_meter import GpuMeter, metered_gpu
from llamatune.training.train import train

H100 = {"name": "NVIDIA H100", "capability": "9.0", "driver": "580.65.06", "cuda_driver": "13.0", "cuda": "12.8"}
NOTHING = {"peak_device_memory_bytes": None, "energy_j": None, "mean_power_w": None, "peak_power_w": None}


class Gpu:
    """Gives the next of these readings at each call, and the last for ever."""

    def __init__(self, power: list[float | None], used: list[int | None], energy: list[float | None]) -> None:
        self._readings = [self._then_last(values) for values in (power, used, energy)]

    @staticmethod
    def _then_last(values: list[Any]) -> Iterator[Any]:
        return itertools.chain(values, itertools.repeat(values[-1]))

    def power_w(self) -> Any:
        return next(self._readings[0])

    def used_bytes(self) -> Any:
        return next(self._readings[1])

    def energy_j(self) -> Any:
        return next(self._readings[2])


class Two(Ranks):
    """The first of two ranks that use the same."""

    size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, json.loads(json.dumps(value))]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds; append to go on."""
    times = [100.0]
    monkeypatch.setattr(gpu_meter, "time", SimpleNamespace(monotonic=lambda: times[-1]))
    return times


def meter_of(*readings: Any) -> GpuMeter:
    return GpuMeter(Gpu(*readings))  # type: ignore[arg-type]


def test_energy_is_the_difference_of_the_counter_and_peaks_are_the_highest_samples(clock: list[float]) -> None:
    meter = meter_of([200.0, 700.0, 300.0], [4 << 30, 9 << 30, 5 << 30], [5000.0, 9000.0])
    clock.append(104.0)
    meter.sample()
    clock.append(110.0)
    assert meter.facts(ALONE) == {
        "peak_device_memory_bytes": 9 << 30, "energy_j": 4000.0, "mean_power_w": 400.0, "peak_power_w": 700.0,
    }  # fmt: skip


def test_without_a_counter_power_is_integrated(clock: list[float]) -> None:
    meter = meter_of([200.0, 600.0, 600.0], [None], [None])
    clock.append(104.0)
    meter.sample()
    clock.append(106.0)
    found = meter.facts(ALONE)
    assert found["energy_j"] == pytest.approx(4 * 400 + 2 * 600)
    assert found["mean_power_w"] == pytest.approx(2800 / 6)
    assert found["peak_device_memory_bytes"] is None


def test_a_sensor_that_fails_once_leaves_no_hole(clock: list[float]) -> None:
    meter = meter_of([200.0, None, 200.0], [None], [None])
    for now in (102.0, 104.0):
        clock.append(now)
        meter.sample()
    assert 400 <= meter.facts(ALONE)["energy_j"] <= 800


def test_a_counter_that_began_anew_is_not_believed(clock: list[float]) -> None:
    meter = meter_of([100.0], [None], [5000.0, 3.0])
    clock.append(110.0)
    assert meter.facts(ALONE)["energy_j"] == pytest.approx(1000.0)


def test_processes_and_ranks_add_up(clock: list[float]) -> None:
    meter = meter_of([300.0], [7], [1000.0, 3000.0])
    meter.restore({"energy_j": 500.0, "metered_s": 5.0, "peak_power_w": 650.0})
    clock.append(110.0)
    assert meter.state(Two()) == {
        "energy_j": 4500.0, "metered_s": 15.0, "peak_power_w": 650.0, "peak_device_memory_bytes": 7,
    }  # fmt: skip
    assert meter.facts(Two())["mean_power_w"] == 300.0


def test_energy_is_unknown_where_a_part_of_the_run_was_not_measured(clock: list[float]) -> None:
    meter = meter_of([300.0], [7], [1000.0, 3000.0])
    meter.restore(None)
    assert meter.facts(ALONE) == {
        "peak_device_memory_bytes": 7, "energy_j": None, "mean_power_w": None, "peak_power_w": 300.0,
    }  # fmt: skip


def test_a_cpu_is_not_measured() -> None:
    with metered_gpu(torch.device("cpu")) as meter:
        assert meter.state(ALONE) is None
        assert meter.facts(ALONE) == NOTHING


def test_a_thread_samples_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_meter, "_INTERVAL_S", 0.001)
    powers = iter(range(1, 1_000_000))
    gpu = Gpu([0.0], [0], [None])
    monkeypatch.setattr(gpu, "power_w", lambda: float(next(powers)))
    monkeypatch.setattr(gpu_meter, "nvml_gpu", lambda device: gpu)
    with metered_gpu(torch.device("cuda")) as meter:
        deadline = time.monotonic() + 20
        while next(powers) < 20 and time.monotonic() < deadline:
            time.sleep(0.002)
    after = next(powers)
    time.sleep(0.02)
    assert next(powers) == after + 1, "nobody samples any more"
    assert meter.facts(ALONE)["peak_power_w"] > 10


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take the CPU that a run computes on for a GPU, in what is recorded."""

    def install(facts: dict[str, Any] | None, *readings: Any) -> None:
        for module in (train_module, run_summary, save_and_resume):
            monkeypatch.setattr(module, "gpu_facts", lambda device: facts)
        gpu = Gpu(*readings) if readings else None
        monkeypatch.setattr(gpu_meter, "nvml_gpu", lambda device: gpu)

    return install


def records(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``origin.json``, and ``state.json`` of the newest checkpoint."""
    return json.loads((run / "origin.json").read_text()), json.loads((last_checkpoint(run) / "state.json").read_text())


def test_a_run_records_its_gpu_and_says_when_it_goes_on_with_another(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, on_gpu: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    spec = make_spec(tiny_base(), prepared(), run)
    on_gpu(H100, [300.0, 500.0], [6 << 30], [1000.0, 4000.0])
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    origin, state = records(run)
    assert (origin["gpu"], state["gpu"]) == (H100, H100)
    assert (state["gpu_use"]["energy_j"], state["gpu_use"]["peak_power_w"]) == (3000.0, 500.0)
    on_gpu({**H100, "name": "NVIDIA A100", "capability": "8.0", "driver": "590.1"}, [200.0], [5 << 30], [70.0, 90.0])
    summary, events = run_and_record(spec)
    lines = [event.message for event in events if isinstance(event, Notice) and "another machine" in event.message]
    assert len(lines) == 1
    assert "gpu name was NVIDIA H100, gpu capability was 9.0, gpu driver was 580.65.06" in lines[0]
    assert records(run)[0]["gpu"] == H100, "where it began"
    assert summary["gpu"]["name"] == "NVIDIA A100"
    assert (summary["energy_j"], summary["peak_power_w"]) == (3020.0, 500.0)
    assert summary["peak_device_memory_bytes"] == 5 << 30
    assert json.loads((run / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(None, None, None), (H100, H100, None), (H100, None, "gpu was NVIDIA H100"), (None, H100, "gpu was none")],
    ids=["on a CPU", "on one GPU", "from a GPU to a CPU", "from a CPU to a GPU"],
)
def test_only_a_change_is_worth_a_notice(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    on_gpu: Callable[..., None],
    first: dict[str, Any] | None,
    second: dict[str, Any] | None,
    expected: str | None,
) -> None:
    run = tmp_path / "run"
    spec = make_spec(tiny_base(), prepared(), run)
    on_gpu(first)
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    assert ("gpu" in records(run)[0]) is (first is not None)
    on_gpu(second)
    summary, events = run_and_record(spec)
    lines = [event.message for event in events if isinstance(event, Notice) and "another machine" in event.message]
    assert [line.partition(": ")[2] for line in lines] == ([] if expected is None else [expected])
    assert {key: summary[key] for key in NOTHING} == NOTHING
    assert "gpu_use" not in records(run)[1]


def test_a_checkpoint_of_an_earlier_version_which_names_no_gpu_is_taken_for_one_of_this() -> None:
    assert save_and_resume._changes({"torch": "2", "threads": 1}, {"torch": "2", "threads": 1, "gpu": H100}) == []


def test_a_driver_whose_release_is_not_known_is_no_other_driver() -> None:
    unknown = {**H100, "driver": None}
    assert save_and_resume._changes({"gpu": unknown}, {"gpu": H100}) == []
    assert save_and_resume._changes({"gpu": H100}, {"gpu": unknown}) == []
    assert save_and_resume._changes({"gpu": H100}, {"gpu": {**H100, "driver": "1"}}) == ["gpu driver was 580.65.06"]
