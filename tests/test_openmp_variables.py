"""What OpenMP reads when torch is loaded: counts as OpenMP itself judges them, and how threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamatune import openmp_variables
from llamatune.errors import EnvironmentFault
from llamatune.openmp_variables import SPINS, THREAD_COUNTS, prepare_openmp, set_openmp_variables, waiting_asleep

OPENMP = next(iter(Path(torch.__file__).parent.glob("lib/libgomp*")), None)


@pytest.mark.skipif(OPENMP is None, reason="this torch brings no libgomp")
@pytest.mark.parametrize(
    "text",
    ["1", "4", " 2 ", "+2", "02", "2,1", "2 , 3", "999999999", "abc", "0", "-1", "1.5", "1e3", "0x2", "2;1", "1,", ",2",
     "2,,3", "9" * 20, "two", "1 2"],
)  # fmt: skip
def test_a_count_is_refused_where_openmp_complains(text: str) -> None:
    load = f"import ctypes; ctypes.CDLL({str(OPENMP)!r})"
    environment = {"OMP_NUM_THREADS": text}
    done = subprocess.run([sys.executable, "-S", "-c", load], env=environment, capture_output=True, check=True)
    try:
        set_openmp_variables(environment)
    except EnvironmentFault as fault:
        assert done.stderr, fault
        assert str(fault) == f"{text!r} is no number of threads: OMP_NUM_THREADS: set it to one, or unset it"
    else:
        assert not done.stderr
        assert environment["OMP_NUM_THREADS"] == text


@pytest.mark.parametrize("name", THREAD_COUNTS)
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_count_is_none(name: str, text: str) -> None:
    environment = {name: text}
    set_openmp_variables(environment)
    assert name not in environment


def test_mkl_too_is_given_a_number() -> None:
    with pytest.raises(EnvironmentFault, match="MKL_NUM_THREADS"):
        set_openmp_variables({"MKL_NUM_THREADS": "abc"})


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("0.00 0.00 0.00 1/200 7\n", {"GOMP_SPINCOUNT": str(SPINS)}),
        ("9.00 0.00 0.00 4/200 7\n", {"GOMP_SPINCOUNT": str(SPINS)}),  # the load of the last minute is no matter
        ("0.00 0.00 0.00 5/200 7\n", {"OMP_WAIT_POLICY": "passive"}),
        ("", {"GOMP_SPINCOUNT": str(SPINS)}),
        (None, {"GOMP_SPINCOUNT": str(SPINS)}),
    ],
)
def test_threads_sleep_at_once_where_others_take_four_cores(
    load: str | None, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(openmp_variables, "_LOAD", tmp_path / "loadavg")
    if load is not None:
        (tmp_path / "loadavg").write_text(load)
    environment: dict[str, str] = {}
    set_openmp_variables(environment)
    assert environment == expected


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_the_user_wants_threads_to_wait_is_left_alone(name: str) -> None:
    environment = {name: "active"}
    set_openmp_variables(environment)
    assert environment == {name: "active"}


def test_threads_of_a_process_with_fewer_cores_sleep_at_once() -> None:
    environment = {"GOMP_SPINCOUNT": str(SPINS), "OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"}
    places = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0 1"}
    assert waiting_asleep({**environment, **places}) == {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    assert environment["OMP_WAIT_POLICY"] == "active"


def test_once_torch_is_loaded_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "abc")
    before = dict(os.environ)
    prepare_openmp()
    assert dict(os.environ) == before


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: text for name, text in os.environ.items() if name not in (*THREAD_COUNTS, "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "llamatune", *arguments]
    return subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=False)


def test_a_verb_refuses_it_on_one_line_and_help_does_not_care() -> None:
    done = run("env", OMP_NUM_THREADS="abc")
    expected = "error: 'abc' is no number of threads: OMP_NUM_THREADS: set it to one, or unset it\n"
    assert (done.returncode, done.stdout, done.stderr) == (5, "", expected)
    assert run("train", "--help", OMP_NUM_THREADS="abc").stderr == ""


@pytest.mark.skipif(OPENMP is None, reason="this torch brings no libgomp")
def test_openmp_is_told_before_torch_loads_it() -> None:
    done = run("env", OMP_NUM_THREADS="", OMP_DISPLAY_ENV="verbose")
    assert done.returncode == 0
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr or "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "Invalid value" not in done.stderr
