"""Memory of the whole GPU, power and energy during a run, sampled from NVML in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llamatune.devices import nvml_gpu
from llamatune.nvml import NvmlGpu
from llamatune.ranks import Ranks

_INTERVAL_S = 0.5
"""Allocators keep what they took, so samples find the peak of memory; NVML's power is an average over up to 1 s."""


class GpuMeter:
    """Measures the GPU of this process from when it is made; nothing on a CPU, and without NVML.

    ``restore`` adds what earlier processes of the run used.
    """

    def __init__(self, gpu: NvmlGpu | None) -> None:
        self._gpu, self._lock = gpu, threading.Lock()
        self._earlier: Mapping[str, Any] = {"energy_j": 0.0, "metered_s": 0.0}
        self._started = self._sampled = time.monotonic()
        self._counter_j = None if gpu is None else gpu.energy_j()
        self._power_w: float | None = None
        self._integrated_j = 0.0
        self._peaks: dict[str, float | None] = {"peak_power_w": None, "peak_device_memory_bytes": None}
        self.sample()

    def sample(self) -> None:
        """Read power and memory once."""
        if self._gpu is None:
            return
        with self._lock:
            power_w, now = self._gpu.power_w(), time.monotonic()
            if power_w is not None:
                between = power_w if self._power_w is None else (power_w + self._power_w) / 2
                self._integrated_j += between * (now - self._sampled)
                self._power_w = power_w
            self._sampled = now
            for name, value in (("peak_power_w", power_w), ("peak_device_memory_bytes", self._gpu.used_bytes())):
                self._peaks[name] = _highest(value, self._peaks[name])

    def restore(self, earlier: Mapping[str, Any] | None) -> None:
        """Continue from the ``state`` of a checkpoint; None: what was used before it is not known."""
        self._earlier = earlier or {"metered_s": 0.0}

    def state(self, ranks: Ranks) -> dict[str, Any] | None:
        """What all ranks of the run used so far, for a checkpoint; None: nothing is measured."""
        self.sample()
        found = ranks.gather({"energy_j": self._energy_j(), **self._peaks})
        known = [use["energy_j"] for use in (*found, self._earlier) if use.get("energy_j") is not None]
        use = {
            "energy_j": sum(known) if len(known) > len(found) else None,
            "metered_s": self._earlier["metered_s"] + time.monotonic() - self._started,
            "peak_power_w": _highest(*(use.get("peak_power_w") for use in (*found, self._earlier))),
            "peak_device_memory_bytes": _highest(*(use["peak_device_memory_bytes"] for use in found)),
        }
        return use if any(value is not None for name, value in use.items() if name != "metered_s") else None

    def facts(self, ranks: Ranks) -> dict[str, Any]:
        """For the summary: null where NVML does not say it. Energy and mean power are those of all GPUs together."""
        use = self.state(ranks) or {"energy_j": None}
        energy_j = use["energy_j"]
        return {
            "peak_device_memory_bytes": use.get("peak_device_memory_bytes"),
            "energy_j": energy_j,
            "mean_power_w": None if energy_j is None else energy_j / max(use["metered_s"], 1e-9),
            "peak_power_w": use.get("peak_power_w"),
        }

    def _energy_j(self) -> float | None:
        """By the GPU's own counter, unless it has none or the driver was loaded anew."""
        counter_j = None if self._gpu is None or self._counter_j is None else self._gpu.energy_j()
        if counter_j is not None and self._counter_j is not None and counter_j >= self._counter_j:
            return counter_j - self._counter_j
        return None if self._power_w is None else self._integrated_j


def _highest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


@contextlib.contextmanager
def metered_gpu(device: torch.device) -> Iterator[GpuMeter]:
    """A meter of ``device`` that is sampled within the block."""
    gpu, done = nvml_gpu(device), threading.Event()
    meter = GpuMeter(gpu)
    if gpu is None:
        yield meter
        return

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            meter.sample()

    thread = threading.Thread(target=watch, name="gpu meter", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        done.set()
        thread.join()
