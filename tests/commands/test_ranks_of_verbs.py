"""Every verb refuses to be one of several processes; a single one runs, whatever its scheduler says of the job."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import spec_values

from llamatune.cli import VERBS as ALL_VERBS
from llamatune.errors import EnvironmentFault
from llamatune.ranks import refuse_ranks

Command = Callable[..., Any]
COUNT = ["count-params", "--preset", "llama-2-7b"]
VERBS = [
    ["prepare-data", "absent.jsonl", "--tokenizer", "absent", "--output", "out"],
    ["train", "absent.yaml"],
    ["train", "absent.yaml", "--dry-run"],
    ["merge-lora", "--model", "absent", "--adapter", "absent", "--output", "out"],
    ["generate", "--model", "absent", "--prompt", "x"],
    COUNT,
    ["evaluate", "--model", "absent", "--data", "absent", "--json"],
    ["benchmark", "absent.yaml", "--output", "out"],
    ["plan-memory", "absent.yaml"],
    ["report", "absent", "--output", "out.html"],
    ["verify", "absent"],
    ["demo", "--output", "out"],
    ["env"],
]
STEP_OF_TWO = {
    "SLURM_JOB_ID": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2",
}  # as srun of Slurm 22.05 sets them
BATCH_SCRIPT = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"}
SUBMITTED_IN_A_STEP = STEP_OF_TWO | {"SLURM_JOB_ID": "6", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_PROCID": "0"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def set_them(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: "-".join(arguments[:3]))
def test_every_verb_refuses_before_it_looks_at_anything(
    command: Command, launched: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    launched(STEP_OF_TWO)
    outcome = command(*arguments)
    assert (outcome.code, outcome.stdout) == (5, "")
    what, where = "srun started 2 processes, and llamatune works in one", "SLURM_STEP_NUM_TASKS"
    assert outcome.stderr == f"error: {what}: {where}: start one: srun --ntasks=1\n"
    assert list(tmp_path.iterdir()) == []


def test_no_verb_is_left_out() -> None:
    assert {arguments[0] for arguments in VERBS} == {*itertools.chain(*ALL_VERBS.values())}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], [], *([verb, "--help"] for verb in itertools.chain(*ALL_VERBS.values()))]
)
def test_help_and_version_are_for_every_process(
    command: Command, launched: Callable[..., None], arguments: list[str]
) -> None:
    launched(STEP_OF_TWO | {"WORLD_SIZE": "1e3"})
    outcome = command(*arguments)
    assert (outcome.code, outcome.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (STEP_OF_TWO | {"SLURM_NTASKS": ""}, "srun started 2 processes"),
        (STEP_OF_TWO | {"PMI_SIZE": "2", "WORLD_SIZE": "2"}, "srun started 2 processes"),
        (STEP_OF_TWO | {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, "srun started 2 processes"),
        ({"WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "none"}, "torchrun started 16 .*: start one, without torchrun"),
        (BATCH_SCRIPT | {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "torchrun started 2"),
        ({"WORLD_SIZE": "2"}, "a launcher started 2 processes.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": " 02 "}, "a launcher started 2 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun started 3 processes.*mpirun -n 1"),
        ({"PMI_SIZE": "3"}, "mpirun started 3 processes"),
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "4"}, "mpirun started 4"),
        (SUBMITTED_IN_A_STEP | {"WORLD_SIZE": "2"}, "a launcher started 2"),
    ],
)  # fmt: skip
def test_several_processes_are_refused_by_the_name_of_what_started_them(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(EnvironmentFault, match=f"^{message}"):
        refuse_ranks(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": " "},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere"},
        {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"},
        BATCH_SCRIPT,
        BATCH_SCRIPT | {"SLURM_NTASKS": "many"},
        STEP_OF_TWO | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell that salloc opened
        SUBMITTED_IN_A_STEP,
        SUBMITTED_IN_A_STEP | {"SLURM_NTASKS": "4"},
        STEP_OF_TWO | {"SLURM_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"},  # by sbatch without --ntasks
        SUBMITTED_IN_A_STEP | {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
    ],
)
def test_one_process_is_not_refused(variables: dict[str, str]) -> None:
    refuse_ranks(variables)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("value", ["abc", "-1", "0", "1e3", "2.0", "1_0", "\u0662", "9" * 5000, "2\n3", "\x1b[31m"])
def test_a_count_that_is_none_is_one_line(
    command: Command, launched: Callable[..., None], name: str, value: str
) -> None:
    launched({name: value})
    outcome = command(*COUNT)
    assert (outcome.code, outcome.stdout) == (5, "")
    assert outcome.stderr.startswith("error: '")
    assert f"is not a number of processes: {name}: unset it" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.strip().isprintable()
    assert len(outcome.stderr) < 200


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": ""}, BATCH_SCRIPT, SUBMITTED_IN_A_STEP], ids=["empty", "batch", "nested"]
)
def test_one_process_trains_and_two_leave_nothing(
    command: Command, launched: Callable[..., None], tiny_base: Callable[..., Path], prepared: Callable[..., Path],
    tmp_path: Path, variables: dict[str, str],
) -> None:  # fmt: skip
    spec = tmp_path / "run.yaml"
    spec.write_text(yaml.safe_dump(spec_values(tiny_base(), prepared(), tmp_path / "run")), encoding="utf-8")
    launched(STEP_OF_TWO)
    assert command("train", spec).code == 5
    assert not (tmp_path / "run").exists()
    launched({"SLURM_STEP_NUM_TASKS": ""} | variables)
    assert command("train", spec, "--json").code == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_itself(processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, "-m", "llamatune", *COUNT, "--json"], capture_output=True, text=True, check=False)
    if processes == 1:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"base_parameters"') == 1
    else:
        assert "error: torchrun started 2 processes" in done.stderr
        assert done.stdout == ""
