"""The variables of launchers, as one process sees them: which mean several processes, and which mean nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from launch_variables import COUNT, STEP_OF_TWO

from llamatune.cli import VERBS

Command = Callable[..., Any]
BATCH_SCRIPT = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"}
SUBMITTED_IN_A_STEP = STEP_OF_TWO | {"SLURM_JOB_ID": "6", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_PROCID": "0"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def set_them(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], [], *([verb, "--help"] for verb in itertools.chain(*VERBS.values()))]
)
def test_help_and_version_are_for_every_process(
    command: Command, launched: Callable[..., None], arguments: list[str]
) -> None:
    launched(STEP_OF_TWO | {"WORLD_SIZE": "1e3"})
    outcome = command(*arguments)
    assert (outcome.code, outcome.stderr) == (0, "")


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere"},
        {"RANK": "3"},
        BATCH_SCRIPT,
        SUBMITTED_IN_A_STEP,
        SUBMITTED_IN_A_STEP | {"SLURM_NTASKS": "4"},
    ],
)
def test_one_process_runs(command: Command, launched: Callable[..., None], variables: dict[str, str]) -> None:
    launched(variables)
    outcome = command(*COUNT)
    assert (outcome.code, outcome.stderr, outcome.stdout.count("\n")) == (0, "", 1)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("value", ["abc", "-1", "0", "1e3", "2.0", "1_0", "\u0662", "9" * 5000, "2\n3", "\x1b[31m"])
def test_a_count_that_is_none_is_one_line(
    command: Command, launched: Callable[..., None], name: str, value: str
) -> None:
    launched({name: value})
    outcome = command(*COUNT)
    assert (outcome.code, outcome.stdout) == (5, "")
    assert outcome.stderr.startswith("error: '")
    assert f": {name}: unset it" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.strip().isprintable()
    assert len(outcome.stderr) < 250


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_ranks_that_cannot_meet_are_one_line(
    command: Command, launched: Callable[..., None], variables: dict[str, str]
) -> None:
    launched(variables)
    outcome = command(*COUNT)
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (5, "", 1)
