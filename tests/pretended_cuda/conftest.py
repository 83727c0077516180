"""Builds the pretended GPU's library once for each release of torch, and starts the process that uses it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"
_LONGEST_JOB_S = 300.0


def library(cache: Path, compiler: str) -> Path:
    """The library in ``cache``, compiled if it is not there; test processes take turns.

    A source that does not compile is an error of the tests, not a reason to skip them.
    """
    folder, flags = Path(torch.__file__).parent, ["-std=c++20", "-shared", "-fPIC", "-w"]
    facts = [SOURCE.read_text(), torch.__version__, str(folder), sys.platform, *flags]
    path = cache / f"device-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            include, libraries = folder / "include", folder / "lib"
            command = [compiler, *flags, f"-I{include}", str(SOURCE), "-o", str(made), f"-L{libraries}"]
            subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
            made.rename(path)
    return path


class Gpu:
    """A process that has the pretended GPU, started with the first job; one that died is started again."""

    def __init__(self, library: Path, stderr: Path) -> None:
        self._command, self._stderr = [sys.executable, str(HERE / "pretended_jobs.py"), str(library)], stderr
        self._process: subprocess.Popen[str] | None = None

    def run(self, **job: Any) -> dict[str, Any]:
        """What a job came to (``pretended_jobs.Found``); its traceback is printed."""
        if self._process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with self._stderr.open("w") as stderr:
                self._process = subprocess.Popen(self._command, stderr=stderr, env=environment, **pipes)
        process, before = self._process, self._stderr.stat().st_size
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answered, _, _ = select.select([process.stdout], [], [], _LONGEST_JOB_S)
            if not answered:
                process.kill()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        sys.stdout.write(self._stderr.read_text()[before:])
        if not line:
            self._process = None
            pytest.fail(f"the process with the pretended GPU ended with {process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH: nothing runs on a pretended GPU")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs: only its CPU build can pretend to have one")
    if sys.platform != "linux":
        pytest.skip("a pretended GPU is known to work on Linux alone")
    cache: Callable[[str], Path] = getattr(request.config, "cache", None) and request.config.cache.mkdir
    gpu = Gpu(
        library((cache or tmp_path_factory.mktemp)("pretended_cuda"), compiler),
        tmp_path_factory.mktemp("gpu") / "stderr",
    )
    yield gpu
    gpu.close()
