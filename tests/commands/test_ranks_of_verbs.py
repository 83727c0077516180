"""A command of several processes: rank 0 prints, each leaves with the same code, and none waits in vain.

The processes are real, started with the variables of torchrun or srun. Each imports torch, which takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from launch_variables import COUNT, STEP_OF_TWO
from slow_cases import slow
from torch.distributed import PrefixStore, TCPStore

import llamatune

ROOT = Path(llamatune.__file__).parents[1]
BASE = ROOT / "llamatune" / "demo" / "base"
TRAINING_STUB = """
import sys
import llamatune.training.train
from llamatune.cli import main
from llamatune.errors import Stopped
from llamatune.events import Notice

def train(spec, *, ranks, on_event, should_stop, **options):
    on_event(Notice(f"rank {ranks.rank}", "info"))
    while spec.training.seed == 1:
        if ranks.any(should_stop()):
            raise Stopped("stopped at step 3", "run")
    return {"ranks": ranks.gather(ranks.rank)}

def plan_training(spec, *, ranks, **options):
    return {"ranks": ranks.gather(ranks.rank)}

llamatune.training.train.train, llamatune.training.train.plan_training = train, plan_training
main()
"""


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class World:
    """Processes of one command, rank by rank."""

    def __init__(self, port: int, where: Path) -> None:
        self.port, self.where, self.processes = port, where, list[subprocess.Popen[str]]()

    def start(self, *words: object, rank: int = 0, size: int = 2, code: str = "", **variables: str) -> None:
        own = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        self.processes.append(
            subprocess.Popen(
                [sys.executable, *(["-c", code] if code else ["-m", "llamatune"]), *map(str, words)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(variables or own)},
                cwd=self.where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip

    def start_all(self, *words: object, size: int = 2, code: str = "") -> None:
        for rank in range(size):
            self.start(*words, rank=rank, size=size, code=code)

    def until(self, key: str, value: str) -> None:
        """Wait until a rank has written this in the store of the ranks."""
        store = PrefixStore("llamatune-0", TCPStore("127.0.0.1", self.port, None, False, timedelta(seconds=60)))
        while store.get(key).decode() != value:
            time.sleep(0.1)

    def ended(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and the lines of all processes on stdout and on stderr."""
        outputs = [process.communicate(timeout=60) for process in self.processes]
        out, err = ([line for text in texts for line in text.splitlines()] for texts in zip(*outputs, strict=True))
        return [process.returncode for process in self.processes], out, err


@pytest.fixture
def world(free_port: int, tmp_path: Path) -> Iterator[World]:
    made = World(free_port, tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def spec_file(where: Path, seed: int = 0) -> Path:
    spec = where / "run.yaml"
    spec.write_text(
        "model: {path: absent}\nlora: {}\ndata: {train: absent}\n"
        f"training: {{output_dir: run, device: cpu, seed: {seed}}}\n"
    )
    return spec


# One result, one line, one code


def test_rank_0_generates_and_prints(world: World) -> None:
    world.start_all("generate", "--model", BASE, "--prompt", "a", "--max-new-tokens", 3, "--device", "cpu", "--json")
    codes, out, err = world.ended()
    assert (codes, len(out), err) == ([0, 0], 1, [])
    assert len(json.loads(out[0])["results"]) == 1


def test_rank_0_reads_the_prompt_from_standard_input(world: World) -> None:
    world.start_all("generate", "--model", BASE, "--max-new-tokens", 3, "--device", "cpu", "--json")
    stdin = world.processes[0].stdin
    assert stdin is not None
    stdin.write("a llama")
    codes, out, err = world.ended()
    assert (codes, len(out), err) == ([0, 0], 1, [])
    assert json.loads(out[0])["results"][0]["prompt"] == "a llama"


def test_tasks_of_srun(world: World) -> None:
    for rank in ("1", "0"):
        world.start("env", "--json", **(STEP_OF_TWO | {"SLURM_PROCID": rank, "MASTER_PORT": str(world.port)}))
    codes, out, err = world.ended()
    assert (codes, len(out), err) == ([0, 0], 1, [])
    assert "packages" in json.loads(out[0])


@pytest.mark.parametrize(
    ("size", "words", "code", "line"),
    [
        (3, ["verify", "absent"], 4, "error: no such directory: absent"),
        (2, ["train", "absent.yaml"], 2, "error: no such file: absent.yaml"),
    ],
)
def test_an_error_is_one_line_and_the_code_of_all(
    world: World, size: int, words: list[str], code: int, line: str
) -> None:
    world.start_all(*words, size=size)
    codes, out, err = world.ended()
    assert (codes, out, len(err)) == ([code] * size, [], 1), err
    assert err[0].startswith(line)


def test_only_one_rank_has_a_bad_option(world: World) -> None:
    world.start(*COUNT, rank=0)
    world.start(*COUNT, "--r", "x", rank=1)
    codes, _, err = world.ended()
    assert (codes, len(err)) == ([2, 2], 1), err


def test_torchrun_itself() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, "-m", "llamatune", *COUNT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"base_parameters"') == 1


def test_two_world_sizes(world: World) -> None:
    world.start(*COUNT, rank=0, size=2)
    world.start(*COUNT, rank=1, size=3)
    codes, out, err = world.ended()
    assert (codes, out, len(err)) == ([5, 5], [], 1), err
    assert "parts of 2 and of 3" in err[0]


def test_two_processes_of_one_rank(world: World) -> None:
    world.start(*COUNT, rank=0, size=3)
    for _ in range(2):
        world.start(*COUNT, rank=1, size=3)
    codes, out, err = world.ended()
    assert (codes, out, len(err)) == ([5, 5, 5], [], 1), err
    assert "two processes were started as rank 1 of 3" in err[0]


def test_an_address_that_nobody_knows(world: World) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "absent.invalid", "MASTER_PORT": str(world.port)}
    world.start(*COUNT, **variables)
    codes, out, err = world.ended()
    assert (codes, out, len(err)) == ([5], [], 1), err
    assert "absent.invalid" in err[0]


# train, whose work is shared


@pytest.mark.parametrize("words", [["--json"], slow(["--dry-run", "--json"])])
def test_train_gets_its_ranks(world: World, tmp_path: Path, words: list[str]) -> None:
    world.start_all("train", spec_file(tmp_path), *words, code=TRAINING_STUB)
    codes, out, err = world.ended()
    assert (codes, [json.loads(line) for line in out]) == ([0, 0], [{"ranks": [0, 1]}])
    assert ["rank 0" in line for line in err] == ([] if "--dry-run" in words else [True])


def test_a_signal_to_one_rank_of_train_is_one_line(world: World, tmp_path: Path) -> None:
    world.start_all("train", spec_file(tmp_path, seed=1), "--json", code=TRAINING_STUB)
    first_line = world.processes[0].stderr.readline()  # type: ignore[union-attr]
    assert "rank 0" in first_line
    world.processes[1].send_signal(signal.SIGUSR1)
    codes, out, err = world.ended()
    assert (codes, out, err) == ([75, 75], [], ["error: stopped at step 3: run"])


# Signals and ends


@pytest.mark.parametrize(("verb", "rank"), [("count-params", 0), ("train", 1)])
def test_a_rank_that_waits_for_the_others_to_start_can_be_stopped(
    world: World, tmp_path: Path, verb: str, rank: int
) -> None:
    world.start(*(COUNT if verb == "count-params" else ["train", spec_file(tmp_path)]), rank=rank)
    if rank == 0:
        world.until("size-0", "2")
    else:
        time.sleep(4)
    world.processes[0].send_signal(signal.SIGTERM)
    started = time.monotonic()
    codes, out, err = world.ended()
    assert (codes, out, len(err)) == ([130 if verb == "count-params" else 75], [], 1 - rank), err
    assert time.monotonic() - started < 30  # long before it would give up


@pytest.mark.parametrize(
    ("number", "codes", "line"),
    [
        (signal.SIGTERM, [130, 130], "error: stopped by a signal: run the same command again"),
        (signal.SIGKILL, [-9, 5], "error: rank 1 of 2: another rank ended, or did not answer in time"),
    ],
)
def test_the_end_of_one_rank_while_rank_0_works(world: World, number: int, codes: list[int], line: str) -> None:
    world.start_all("generate", "--model", BASE)  # rank 0 reads prompts from stdin, which stays open
    for key in ("beat-0", "beat-1"):
        world.until(key, "1")
    world.processes[1 if number == signal.SIGTERM else 0].send_signal(number)
    world.processes[0].wait(20)
    seen, out, err = world.ended()
    assert (seen, out, len(err)) == (codes, [], 1), err
    assert err[0].startswith(line)
