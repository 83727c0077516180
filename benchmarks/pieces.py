"""Pieces of measurements that go on where they were cut off: each report is a line of JSON, made once.

A piece writes below one directory: ``measured.jsonl``, table, facts of the machine, traces. ``PIECE.tar`` beside it
holds all of it, and is written anew after each measurement; a piece whose directory is gone starts from its tar.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steps
import torch
from bench import Bench
from drawn_base import forget_base
from tables import Table, commit, versions

from llamatune.devices import choose_device, gpu_facts

GPU_QUERY = ("name", "uuid", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem",
             "clocks.sm", "temperature.gpu", "ecc.mode.current", "mig.mode.current")  # fmt: skip


class OutOfTime(Exception):
    """The next measurement would not fit into the minutes given."""


class PieceBench(Bench):
    """A ``Bench`` whose reports are kept, and whose steps run in this process on a base that is drawn once.

    ``until``: the time (of ``time.monotonic``) at which the last measurement has to be done.
    """

    drawn = True

    def __init__(self, options: Any, directory: Path, scratch: Path, until: float) -> None:
        super().__init__(options, scratch)
        self.directory, self._until, self._took = directory, until, dict[str, float]()
        self._file = directory / "measured.jsonl"
        restore(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._reports = {line["key"]: line for line in map(json.loads, filter(str.strip, lines))}
        self.device = choose_device(options.device)
        (directory / "machine.json").write_text(json.dumps(machine_facts(self.device), indent=1))

    def once(self, kind: str, settings: Any, seconds: float, work: Callable[[], Any]) -> Any:
        """What ``work`` returns (JSON), or returned in an earlier call; ``seconds`` are what it may take.

        Raises:
            OutOfTime: it would not fit.
        """
        text = json.dumps([kind, settings], sort_keys=True).replace(str(self.scratch), "")
        key = re.sub(r"/\d{3}-", "/", text)
        if key in self._reports:
            return self._reports[key]["result"]
        if time.monotonic() + max(seconds, self._took.get(kind, 0.0)) > self._until:
            raise OutOfTime
        started = time.monotonic()
        result = work()
        took = time.monotonic() - started
        self._took[kind] = max(took, self._took.get(kind, 0.0))
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        line = {"key": key, "took_s": took, "device": gpu, "commit": commit(), "result": result}
        self._reports[key] = line
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    def report(self, script: str, values: Any) -> dict[str, Any]:
        """As ``Bench.report``, kept; steps run in this process, unless they are to have ``own_process``."""

        def work() -> dict[str, Any]:
            here = script == "steps.py" and not values.get("own_process")
            if not here or not (values["theirs"] or any(_is_plain(spec) for spec in values["ours"].values())):
                forget_base()  # nothing in this process shares it
            steps.empty_device()
            return {**steps.measure(values), "wall_s": None} if here else Bench.report(self, script, values)

        if values.get("own_process"):
            return work()  # kept by the caller
        report: dict[str, Any] = self.once(script, values, _SECONDS[script], work)
        return report


def _is_plain(spec: Any) -> bool:
    return spec["model"]["dtype"] in ("float32", "bfloat16", "float16")


_SECONDS = {"steps.py": 45.0, "side_llamatune.py": 60.0, "side_trainer.py": 100.0}
"""What a report may take at first; later ones of its kind take what the longest took."""


def pack(directory: Path) -> None:
    """Write all of a piece into ``PIECE.tar`` beside its directory."""
    path = directory.with_suffix(".tar")
    unfinished = path.with_suffix(".tar.part")
    with tarfile.open(unfinished, "w") as archive:
        archive.add(directory, directory.name)
    unfinished.replace(path)


def restore(directory: Path) -> None:
    """Unpack a piece's tar where its directory is not there."""
    path = directory.with_suffix(".tar")
    if path.exists() and not directory.exists():
        with tarfile.open(path) as archive:
            archive.extractall(directory.parent, filter="data")


def run_piece(
    bench: PieceBench, table: Table, measurements: dict[str, Callable[[PieceBench, Table], None]]
) -> list[str]:
    """Make every measurement that is left; the names of those that failed. The tar is written after each.

    Raises:
        OutOfTime: the rest does not fit.
    """
    failed = []
    try:
        for name, measure in measurements.items():
            try:
                measure(bench, table)
            except OutOfTime:
                raise
            except (Exception, SystemExit) as fault:
                if "CUDA error" in str(fault):
                    raise  # nothing more can be computed in this process
                failed.append(name)
                table.note(f"{name} failed: {(str(fault).strip() or type(fault).__name__).splitlines()[-1]}")
            steps.empty_device()
            pack(bench.directory)
    finally:
        pack(bench.directory)
    return failed


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What has to be known of a machine to compare figures: GPU, driver, clocks, versions, allocator."""
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit(), "platform": platform.platform(),
        "python": platform.python_version(), "cores": os.cpu_count(), "versions": versions(),
        "gpu": gpu_facts(device), "cudnn": torch.backends.cudnn.version(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }  # fmt: skip
    query = f"--query-gpu={','.join(GPU_QUERY)}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return facts
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return {**facts, "nvidia_smi": dict(zip(GPU_QUERY, values, strict=False))}


_VARIABLES = ("CUDA_", "PYTORCH_", "TORCH", "CUBLAS_", "NVIDIA_TF32", "OMP_NUM")
