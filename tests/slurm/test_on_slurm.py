"""Jobs on a real Slurm of two nodes, by scripts that ``llamatune slurm`` wrote, training on the CPU.

Slurm sends a signal at most every half a minute, so jobs that wait for one are submitted first and looked at last.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from local_slurm import LocalSlurm, wait_for, why_not
from run_tools import assert_same_outcome, last_checkpoint, metrics

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
STEPS = 120
"""More than two starts of a minute make: the signal comes within 45 s of each, and a slowed step takes a second."""

SPEC = f"""\
model: {{path: {ROOT}/llamatune/demo/base, dtype: float32}}
lora: {{r: 4, alpha: 8, dropout: 0.1}}
data: {{train: prepared}}
training:
  output_dir: OUTPUT
  max_steps: {STEPS}
  micro_batch_size: 2
  gradient_accumulation_steps: 3
  learning_rate: 1e-3
  precision: fp32
  device: cpu
  save_every_steps: 5
  tokens_per_pass: null  # auto may choose otherwise for another number of ranks
"""
ONE_MINUTE = ("--time=1", "--signal=USR1@30")
"""Options for ``sbatch``, which replace those of a script: the signal comes in the middle of the minute."""

SLOWED = {"SLOWED_S": "1", "SLOWED_STARTS": "2"}


def llamatune(*words: object, at: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llamatune", *map(str, words)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    if reason := why_not():
        pytest.skip(f"no Slurm can be started here: {reason}")
    with LocalSlurm() as started:
        yield started


@pytest.fixture(scope="module")
def place(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the jobs: prepared rows, and ``llamatune`` as the jobs find it on their PATH."""
    place = tmp_path_factory.mktemp("jobs")
    words = ["--tokenizer", ROOT / "llamatune/demo/base/tokenizer.model", "--output", "prepared"]
    llamatune("prepare-data", ROOT / "llamatune/demo/instructions.jsonl", *words, "--limit", 95, at=place)
    tool = place / "bin" / "llamatune"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/slowed_llamatune.py "$@"\n')
    tool.chmod(0o755)
    return place


class Training:
    """The training job ``name``: its script, its run directory, and its number once it is submitted."""

    def __init__(self, slurm: LocalSlurm, place: Path, name: str, *options: object) -> None:
        self.slurm, self.place, self.run, self.spec = slurm, place, place / name, place / f"{name}.yaml"
        self.spec.write_text(SPEC.replace("OUTPUT", name), encoding="utf-8")
        self.script = place / f"{name}.sh"
        llamatune("slurm", self.spec.name, *options, "--output", self.script.name, at=place)

    def submit(self, *options: str, **environment: str) -> Training:
        environment |= {"PATH": f"{self.place}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.job = self.slurm.submit(self.script, *options, at=self.place, **environment)
        return self

    @property
    def log(self) -> str:
        log = self.place / f"train-{self.job}.log"
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def steps(self) -> int:
        return len(re.findall(r" step=\d+/", self.log))

    def wait(self, state: str, timeout_s: float) -> dict[str, str]:
        try:
            return self.slurm.wait(self.job, state, timeout_s)
        except (AssertionError, TimeoutError) as fault:
            raise AssertionError(f"{fault}\n{self.log[-3000:]}") from fault


@pytest.fixture(scope="module")
def stopped_job(slurm: LocalSlurm, place: Path) -> Training:
    """A rank on each of two nodes; the time limit ends it twice before it can be done."""
    return Training(slurm, place, "stopped", "--nodes", 2).submit(*ONE_MINUTE, **SLOWED)


@pytest.fixture(scope="module")
def exec_job(slurm: LocalSlurm, place: Path) -> Training:
    """The failing control: the script replaces itself by srun, so that nothing is left to ask for a requeue."""
    training = Training(slurm, place, "exec")
    text = training.script.read_text(encoding="utf-8")
    (command,) = re.findall(r"^srun .* llamatune train exec\.yaml", text, re.MULTILINE)
    training.script.write_text(f"{text.partition('code=0')[0]}exec {command}\n", encoding="utf-8")
    return training.submit(*ONE_MINUTE, **SLOWED)


TOLD = """scontrol show job "$SLURM_JOB_ID" | grep -o "EndTime=[^ ]*"
"""
AS_LATER_SLURMS = """end=$(scontrol show job "$SLURM_JOB_ID" | grep -oP "EndTime=\\K\\S+")
export SLURM_JOB_END_TIME=$(date -d "$end" +%s)
"""


@pytest.fixture(scope="module")
def timed_jobs(slurm: LocalSlurm, place: Path) -> list[Training]:
    """Jobs of three minutes without a signal, which the time ends twice each; the log has each start's end.

    A step takes at least 3 s, so the two first starts make at most 2 x 160 / 3 = 106 of the 120.
    """
    jobs = []
    for name, nodes, more in (("timed", 1, ""), ("timed-2-ranks", 2, ""), ("timed-by-variable", 1, AS_LATER_SLURMS)):
        training = Training(slurm, place, name, "--nodes", nodes, "--time", "3")
        text = training.script.read_text(encoding="utf-8")
        assert "--signal" not in text
        training.script.write_text(text.replace("code=0\n", f"{TOLD}{more}code=0\n"), encoding="utf-8")
        training.spec.write_text(training.spec.read_text().replace("save_every", "keep_last: 999\n  save_every"))
        jobs.append(training.submit(SLOWED_S="3", SLOWED_STARTS="2"))
    return jobs


@pytest.fixture(scope="module", autouse=True)
def slow_jobs(stopped_job: Training, exec_job: Training, timed_jobs: list[Training]) -> None:
    """They begin before anything else."""


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    """The run directory of the same run in one process, without Slurm."""
    (place / "alone.yaml").write_text(SPEC.replace("OUTPUT", "alone"), encoding="utf-8")
    llamatune("train", "alone.yaml", at=place)
    return place / "alone"


Noting = Callable[..., str]


@pytest.fixture
def noting(slurm: LocalSlurm, tmp_path: Path) -> Noting:
    """Submit a generated script with a ``llamatune`` that is the given shell command; the number of the job."""

    def submit(command: str, specs: list[str], *options: object, sbatch: tuple[str, ...] = ()) -> str:
        for name in specs:
            (tmp_path / name).write_text(SPEC.replace("OUTPUT", f"run-{len(name)}").replace("cpu", "auto"))
        llamatune("slurm", *specs, *options, "--output", "job.sh", at=tmp_path)
        tool = tmp_path / "bin" / "llamatune"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/bash\n{command}\n")
        tool.chmod(0o755)
        return slurm.submit(tmp_path / "job.sh", *sbatch, at=tmp_path, PATH=f"{tool.parent}:{os.environ['PATH']}")

    return submit


QUEUED_S = 600
"""How long a job may take that waits behind those of other tests, which have the processors."""

TAKE_GPU = """\
import os
import torch
from llamatune import devices
from llamatune.launch_variables import read_launch

visible, launch = os.environ["CUDA_VISIBLE_DEVICES"], read_launch()
devices.gpu_count = lambda: len(visible.split(","))
gpu = devices._gpu_of_rank(torch.device("cuda"), launch.local_rank)
threads = os.environ["OMP_NUM_THREADS"], os.environ["SRUN_CPUS_PER_TASK"]
print(f"rank {launch.rank} of {launch.world_size} at {launch.address}: sees {visible}, takes {gpu}", *threads)
"""


def test_each_rank_of_a_node_gets_a_gpu_of_its_own(slurm: LocalSlurm, noting: Noting, tmp_path: Path) -> None:
    """Two nodes of two GPUs. A task sees those of its node, as NCCL needs it, and takes one by its local rank.

    The job is submitted without the environment; still its step has what the script exports.
    """
    (tmp_path / "take.py").write_text(TAKE_GPU)
    command = f"PYTHONPATH={ROOT} exec {sys.executable} {tmp_path}/take.py"
    two_by_two = ("--nodes", 2, "--gpus-per-node", 2)
    job = noting(command, ["a.yaml"], *two_by_two, sbatch=("--cpus-per-task=3", "--export=PATH"))
    slurm.wait(job, "COMPLETED", QUEUED_S)
    said = (tmp_path / f"train-{job}.log").read_text().splitlines()
    assert sorted(said) == [f"rank {rank} of 4 at n1: sees 0,1, takes cuda:{rank % 2} 3 3" for rank in range(4)]


def test_a_task_of_an_array_requeues_itself_alone(slurm: LocalSlurm, noting: Noting, tmp_path: Path) -> None:
    """The last one, whose SLURM_JOB_ID is that of the whole array."""
    specs = ["it's a run.yaml", '-my "$HOME" `run` {0}.yaml']
    again = '[ "$SLURM_ARRAY_TASK_ID" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && sleep 1 && exit 75; exit 0'
    job = noting(f'echo "$SLURM_ARRAY_TASK_ID:$2"; {again}', [specs[0], f"./{specs[1]}"], "--array")
    for task in range(2):
        slurm.wait(f"{job}_{task}", "COMPLETED", QUEUED_S)
    assert [slurm.facts(f"{job}_{task}")["Restarts"] for task in range(2)] == ["0", "1"]
    logs = [(tmp_path / f"train-{job}_{task}.log").read_text() for task in range(2)]
    assert logs[0] == f"0:{specs[0]}\n"
    assert [line for line in logs[1].splitlines() if line.startswith("1:")] == [f"1:./{specs[1]}"] * 2


def test_ranks_that_end_one_after_the_other_are_requeued(slurm: LocalSlurm, noting: Noting) -> None:
    """Though this Slurm is set to kill a step's processes once one has failed."""
    command = "sleep $((3 * SLURM_PROCID)); exit $((SLURM_RESTART_COUNT ? 0 : 75))"
    job = noting(command, ["a.yaml"], "--nodes", 2)
    assert slurm.wait(job, "COMPLETED", 60)["Restarts"] == "1"


def test_a_cancelled_job_is_saved_and_ends(slurm: LocalSlurm, place: Path) -> None:
    training = Training(slurm, place, "cancelled", "--nodes", 2).submit(SLOWED_S="1", SLOWED_STARTS="9")
    wait_for(lambda: training.steps() % 5 == 1, 90, "first step")  # far from the fifth, which is saved anyway
    slurm.run("scancel", training.job)
    facts = training.wait("CANCELLED", 60)
    wait_for(lambda: not slurm.processes("cancelled.yaml"), 30, "end of the processes")
    made = len(metrics(training.run, "step"))
    assert last_checkpoint(training.run).name == f"step-{made:06d}"
    assert made % 5, "a checkpoint of every fifth step would be there without the signal"
    assert facts["Restarts"] == "0"


def test_the_exec_form_is_not_requeued(exec_job: Training) -> None:
    facts = exec_job.wait("FAILED", 120)
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert "saved step=" in exec_job.log


def test_the_time_limit_stops_the_job_twice_and_it_ends_in_the_same_bytes(
    stopped_job: Training, uninterrupted: Path, tell: Callable[[str], None]
) -> None:
    facts = stopped_job.wait("COMPLETED", 300)
    stops = re.findall(r"saved step=(\d+) .*\nerror: stopped", stopped_job.log)
    tell(f"requeued {facts['Restarts']} times, stopped at the steps {', '.join(stops)} of {STEPS}")
    assert int(facts["Restarts"]) == len(stops) >= 2
    assert_same_outcome(stopped_job.run, uninterrupted)


def test_jobs_without_a_signal_are_saved_in_time_and_not_long_before(
    timed_jobs: list[Training], uninterrupted: Path, tell: Callable[[str], None]
) -> None:
    """Six ends of jobs, by Slurm's own record of each and the times of the checkpoints."""
    left = list[str]()
    for training in timed_jobs:
        facts = training.wait("COMPLETED", 700)
        starts = re.split(r"EndTime=(\S+)\n", training.log)[1:]
        ends = [datetime.fromisoformat(end).timestamp() for end in starts[::2]]
        saves_s = map(float, re.findall(r"saved step=.* seconds=(\S+)", training.log))
        elapsed_s = [float(text) for text in re.findall(r" step=.* elapsed_s=(\S+)", training.log)]
        longest_s = max(saves_s) + max(after - before for before, after in itertools.pairwise(elapsed_s))
        assert int(facts["Restarts"]) == len(ends) - 1 >= 2
        for end, said in zip(ends[:-1], starts[1::2], strict=False):
            assert "before the job's time limit after step" in said, said
            if steps := re.findall(r"saved step=(\d+)", said):  # a busy machine may begin too late for one
                saved = training.run / "checkpoints" / f"step-{int(steps[-1]):06d}" / "state.json"
                left_s = end - saved.stat().st_mtime
                assert 20 <= left_s <= 20 + max(0.02 * 180, 2.5 * longest_s), training.log
                left.append(f"{left_s:.1f}")
        assert_same_outcome(training.run, uninterrupted)
    tell(f"saved {', '.join(left)} s before the end")


@pytest.mark.parametrize("how", ["down", "off"])
def test_a_lost_node_requeues_the_job(
    slurm: LocalSlurm, place: Path, uninterrupted: Path, how: str, tell: Callable[[str], None]
) -> None:
    """Set DOWN, or without power, which Slurm notices before the rank that is left has waited its 600 s."""
    training = Training(slurm, place, how, "--nodes", 2).submit(SLOWED_S="0.5", SLOWED_STARTS="1")
    wait_for(lambda: training.steps() >= 12, 90, "twelfth step")
    if how == "down":
        slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    else:
        slurm.power_off("n2")
    wait_for(lambda: slurm.facts(training.job)["Restarts"] == "1", 90, "requeue")
    if how == "off":
        slurm.power_on("n2")
    wait_for(lambda: slurm.bring_back("n2"), 60, "node n2")
    training.wait("COMPLETED", 180)
    first, *others = map(int, re.findall(r"resumed_step=(\d+)", training.log))
    tell(f"continued at step {others[-1]} of {STEPS}")
    assert first == 0
    assert others[-1] >= 10  # saved when n1's rank was told to end, or every five steps
    assert_same_outcome(training.run, uninterrupted)


def test_no_process_is_left(slurm: LocalSlurm) -> None:
    wait_for(lambda: not slurm.processes(), 30, f"end of {slurm.processes()}")
