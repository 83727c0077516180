"""A sample of the fuzzer (`make test-fuzz`); whether sound files pass, and faults that were planted are found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import FAULTS

HERE = Path(__file__).parent
SAMPLE = 2
"""Mutations of each file, each read by one of its verbs."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run of the fuzzer leaves the sound files for the second."""
    return tmp_path_factory.mktemp("fuzz") / "materials"


def fuzzed(script: str, materials: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / script), "--materials", str(materials), "--processes", "1", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_sample_of_damaged_files_ends_in_documented_ways(materials: Path, tell: Callable[[str], None]) -> None:
    done = fuzzed("fuzz.py", materials, "--mutations", str(SAMPLE))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    tell(done.stdout.splitlines()[-1])


def test_every_verb_accepts_its_sound_files(materials: Path, tell: Callable[[str], None]) -> None:
    """Else a mutation of a file would be refused for something else, and tell nothing."""
    done = fuzzed("fuzz.py", materials, "--sound")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    tell(done.stdout.splitlines()[-1])


def test_planted_faults_are_found(materials: Path) -> None:
    done = fuzzed("planted.py", materials)
    assert done.returncode == 1, done.stderr
    missed = [kind for kind in FAULTS if kind not in done.stdout]
    assert not missed, done.stdout
