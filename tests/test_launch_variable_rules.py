"""The launch that srun, torchrun and others describe in the environment: rank, world size, address; or one line."""

from __future__ import annotations

import pytest

from llamatune.errors import EnvironmentFault
from llamatune.launch_variables import Launch, first_node, read_launch

STEP_OF_TWO = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2",
}  # as srun of Slurm 22.05 sets them
BATCH_SCRIPT = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"}
SUBMITTED_IN_A_STEP = STEP_OF_TWO | {"SLURM_JOB_ID": "6", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_PROCID": "0"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


def test_srun_on_one_node_meets_on_the_loopback_address() -> None:
    launch = read_launch(STEP_OF_TWO)
    assert launch == Launch("srun", 1, 2, 1, "127.0.0.1", launch.port)
    assert 20_000 <= launch.port < 32_000


def test_srun_on_several_nodes_meets_at_the_first_one() -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
    launch = read_launch(STEP_OF_TWO | nodes)
    assert (launch.address, launch.local_rank) == ("gpu03", 0)


def test_two_steps_of_a_job_and_two_jobs_meet_on_different_ports() -> None:
    steps = [STEP_OF_TWO | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} for job in "23" for step in "01"]
    assert len({read_launch(step).port for step in steps}) == 4


def test_the_users_address_and_port_come_first() -> None:
    launch = read_launch(STEP_OF_TWO | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert (launch.address, launch.port) == ("10.0.0.7", 1234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-012,014],login", "gpu003"),
        ("rack[1-2]node[08-09],x", "rack1node08"),
        ("a-b.c[7]", "a-b.c7"),
    ],
)
def test_the_first_node_of_slurms_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("around", [{}, STEP_OF_TWO | {"SLURM_PROCID": "0"}], ids=["alone", "a torchrun on each node"])
def test_torchrun(around: dict[str, str]) -> None:
    assert read_launch(around | TORCHRUN) == Launch("torchrun", 9, 16, 1, "n1", 29500)


def test_the_variables_of_any_other_launcher() -> None:
    variables = {"WORLD_SIZE": " 02 ", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "9"}
    assert read_launch(variables) == Launch("a launcher", 1, 2, 1, "h", 9)


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
def test_one_process(variables: dict[str, str]) -> None:
    assert read_launch(variables) == Launch()


def test_brackets_of_an_ipv6_address_are_dropped() -> None:
    for variables in (TORCHRUN, STEP_OF_TWO):
        assert read_launch(variables | {"MASTER_ADDR": "[fe80::1]"}).address == "fe80::1"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (STEP_OF_TWO | {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, "srun started 2 .* worlds of 1: WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (SUBMITTED_IN_A_STEP | {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun started 3 processes and gives them no address"),
        ({"PMI_SIZE": "3"}, "mpirun started 3 processes"),
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "4"}, "mpirun started 4"),
        (TORCHRUN | {"RANK": "16"}, "'16' is not a number from 0 to 15: RANK"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (STEP_OF_TWO | {"SLURM_PROCID": ""}, "SLURM_PROCID"),
        (STEP_OF_TWO | {"SLURM_PROCID": "2"}, "SLURM_PROCID"),
    ],
)
def test_a_launch_that_cannot_work_is_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message) as caught:
        read_launch(variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("value", ["abc", "-1", "0", "1e3", "2.0", "1_0", "\u0662", "9" * 5000, "2\n3", "\x1b[31m"])
def test_a_count_that_is_none_is_one_line(name: str, value: str) -> None:
    with pytest.raises(EnvironmentFault, match="is not a number from 1") as caught:
        read_launch({name: value})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
