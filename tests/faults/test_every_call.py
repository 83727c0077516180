"""Every system call with which a run changes its directory is made to fail, and the run is killed before every one.

After each fault the same command is run again, undisturbed. The outcome is what it would have been without the fault,
byte for byte; a run that could not write has said so, with exit code 5.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, building, leftovers, names_below, training
from tracing import FAULTS, Call, changing_calls, fault_options, injected, record_options
from warm import NO_STRACE, Ended, Warm, strace

pytestmark = pytest.mark.skipif(strace() is None, reason=NO_STRACE)

SPACE = re.compile(r"no space left for (one more name|[1-9][\d,]* bytes), [\d,]+ are free")
Tell = Callable[[str], None]
Runner = Callable[[list[str], list[str] | None, Path | None], Ended]


@dataclass
class Sweep:
    """What the faults of one job came to."""

    calls: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.faults.total()} faults {dict(self.faults)}, exit codes {dict(self.codes)}, "
            f"{len(self.bad)} bad outcomes"
        )


def warm_runner(warm: Warm, job: Job, broken: str | None = None) -> Runner:
    return lambda arguments, tracing, log: warm.run(
        arguments, tracing=tracing, log=log, loss_scale=job.loss_scale, broken=broken
    )


def cold_runner(arguments: list[str], tracing: list[str] | None, log: Path | None) -> Ended:
    """A process like a user's, from its first instruction."""
    tracer = ["strace", "-f", "-qq", "-o", str(log), *tracing] if tracing is not None else []
    done = subprocess.run([*tracer, sys.executable, "-m", "llamatune", *arguments], capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr, 0.0)


def swept(
    run: Runner,
    job: Job,
    scratch: Path,
    every: int = 1,
    faults: tuple[str, ...] = FAULTS,
    among: Callable[[Call], bool] = lambda call: True,
) -> Sweep:
    """Each fault at each call, or every so many-th of these pairs."""
    (scratch / "whole").mkdir(parents=True)
    undisturbed = run(job.arguments(scratch / "whole"), record_options(), scratch / "log")
    assert undisturbed.code == 0, undisturbed.stderr
    calls = [call for call in changing_calls(scratch / "log", scratch / "whole") if among(call)]
    expected, names = job.product(scratch / "whole"), names_below(scratch / "whole")
    assert expected
    sweep = Sweep(len(calls))
    for call, fault in [(call, fault) for call in calls for fault in faults][::every]:
        place = scratch / "faulty"
        place.mkdir()
        ended = run(job.arguments(place), fault_options(call, fault), scratch / "log")
        found = _judge(run, job, place, ended, fault, expected, names, injected(scratch / "log"))
        sweep.faults[fault] += 1
        sweep.codes[ended.code] += 1
        sweep.bad += [f"{fault} at {call.text.replace(str(scratch), '')}: {line}" for line in found]
        shutil.rmtree(place)
    shutil.rmtree(scratch / "whole")
    return sweep


def _judge(
    run: Runner, job: Job, place: Path, ended: Ended, fault: str, expected: Any, names: list[str], hits: list[str]
) -> list[str]:
    """All that is wrong after a fault and after the next run."""
    bad = []
    if fault == "kill":
        if ended.code != -9:
            bad.append(f"not killed but {ended.code}")
    else:
        if len(hits) != 1 or str(place) not in hits[0]:
            bad.append(f"the fault hit {hits}")
        if ended.code not in (0, 5):
            bad.append(f"exit code {ended.code}: {ended.stderr[-500:]}")
        said = ended.stderr.splitlines()
        if ended.code == 5 and not (said[-1].startswith("error: ") and str(place) in said[-1]):
            bad.append(f"the error names no path: {said[-1]}")
        if ended.code == 5 and fault in ("ENOSPC", "EDQUOT") and not SPACE.search(said[-1]):
            bad.append(f"the error does not say how much is needed and how much is free: {said[-1]}")
        if ended.code == 5 and ended.stdout:
            bad.append(f"an error, and on stdout {ended.stdout}")
        if ended.code == 0 and _difference(job.product(place), expected):
            bad.append(f"exit code 0 with another outcome: {_difference(job.product(place), expected)}")
    if "Traceback" in ended.stderr:
        bad.append(ended.stderr[-500:])
    if job.whole_or_none and job.product(place) not in (None, expected):
        bad.append("half a product")
    before = leftovers(place)
    again = run(job.arguments(place), None, None)
    if again.code != 0:
        return [*bad, f"run again: exit code {again.code}: {again.stderr[-500:]}"]
    if difference := _difference(job.product(place), expected):
        bad.append(f"run again: another outcome: {difference}")
    if ended.code != 0 and names_below(place) != names:
        bad.append(f"run again: other names, {sorted(set(names_below(place)) ^ set(names))} (left behind: {before})")
    json.loads(again.stdout)
    return bad


def _difference(found: Any, expected: Any) -> list[str]:
    if found is None:
        return ["no product"]
    return [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]


@pytest.fixture(scope="module")
def jobs(
    warm: Warm,
    job_file: Callable[..., tuple[str, ...]],
    small_base: Path,
    tiny_rows: Path,
    tiny_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Job]:
    """Steps that improve the validation loss twice, so that best/ is made and replaced."""
    run = tmp_path_factory.mktemp("adapter") / "run"
    train = job_file(training__learning_rate=0.05, training__tokens_per_pass=None)
    made = warm.run([*train, f"training.output_dir={run}"])
    assert made.code == 0, made.stderr
    assert made.stderr.count("best=true") == 2
    merge = ("merge-lora", "--model", str(small_base), "--adapter", str(run / "adapter"), "--json")
    prepare = ("prepare-data", str(tiny_rows), "--tokenizer", str(tiny_tokenizer), "--skip-bad-rows", "99", "--json")
    cached = job_file(
        model__dtype="nf4", model__quantized_cache="{place}", data__packing=True, data__packed_tokens=60,
        training__optimizer="adamw_8bit", training__gradient_accumulation_steps=1,
        lora={"r": 64, "alpha": 64, "dropout": 0.1, "target_modules": "all-linear"},
    )  # fmt: skip
    return {
        "train": training(train),
        MERGE: building(merge),
        PREPARE: building((*prepare, "--validation-fraction", "0.2")),
        "merge-lora to meta": building((*merge, "--format", "meta")),
        "every parameter": training(job_file(lora=None, training__learning_rate=1e-3)),
        NF4: training((*cached, "model.quantized_cache={place}/cache")),
    }


MERGE, PREPARE, NF4 = "merge-lora", "prepare-data", "nf4 with a cache, packed, 8-bit"
VERBS = ("train", MERGE, PREPARE)
OTHERS = ("merge-lora to meta", "every parameter", NF4)


@pytest.mark.parametrize(("name", "every"), [("train", 61), (MERGE, 23), (PREPARE, 23)])
def test_a_fault_at_some_of_the_calls_changes_no_outcome(
    warm: Warm, jobs: dict[str, Job], tmp_path: Path, name: str, every: int, tell: Tell
) -> None:
    sweep = swept(warm_runner(warm, jobs[name]), jobs[name], tmp_path, every)
    assert sweep.faults.keys() == set(FAULTS)
    tell(str(sweep))
    assert not sweep.bad, "\n".join(sweep.bad)


def test_a_writer_that_is_not_atomic_is_caught(warm: Warm, jobs: dict[str, Job], tmp_path: Path) -> None:
    """The positive control: the same sweep over a writer that writes checkpoints where they are read."""
    job = jobs["train"]
    sweep = swept(
        warm_runner(warm, job, "in_place"), job, tmp_path, 3, ("kill",), lambda call: "/step-000003" in call.text
    )
    assert sweep.bad


def test_a_writer_that_is_silent_is_caught(warm: Warm, jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["train"]
    sweep = swept(warm_runner(warm, job, "silent"), job, tmp_path, 6, ("EIO",), lambda call: "-adapter/" in call.text)
    assert sweep.bad
    assert all("exit code 0 with another outcome: ['adapter/" in line or "run again" in line for line in sweep.bad)


@pytest.mark.parametrize(("fault", "calls"), [("ESTALE", ("openat", "rename")), ("ENOTEMPTY", ("rmdir",))])
def test_what_network_file_systems_answer_changes_no_outcome(
    warm: Warm, jobs: dict[str, Job], tmp_path: Path, fault: str, calls: tuple[str, ...], tell: Tell
) -> None:
    """A handle that went stale, and a directory that stays full as removed files in it are still open somewhere."""
    job = jobs["train"]
    sweep = swept(warm_runner(warm, job), job, tmp_path, 5, (fault,), lambda call: call.name.startswith(calls))
    assert sweep.faults[fault] > 0
    tell(str(sweep))
    assert not sweep.bad, "\n".join(sweep.bad)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(warm: Warm, jobs: dict[str, Job], tmp_path: Path) -> None:
    job, said = jobs["train"], []

    def run(arguments: list[str], tracing: list[str] | None, log: Path | None) -> Ended:
        said.append(warm_runner(warm, job)(arguments, tracing, log))
        return said[-1]

    sweep = swept(run, job, tmp_path, 4, ("EIO",), lambda call: ".trash-" in call.text)
    assert sweep.codes == {0: sweep.faults["EIO"]}
    assert not sweep.bad, "\n".join(sweep.bad)
    assert sum("could not remove the old checkpoint" in ended.stderr for ended in said) == sweep.faults["EIO"]


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_any_fault_at_any_call_changes_no_outcome(
    warm: Warm, jobs: dict[str, Job], tmp_path: Path, name: str, tell: Tell
) -> None:
    sweep = swept(warm_runner(warm, jobs[name]), jobs[name], tmp_path)
    assert sweep.faults.total() == sweep.calls * len(FAULTS)
    tell(str(sweep))
    assert not sweep.bad, "\n".join(sweep.bad)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_fault_in_other_configurations_changes_no_outcome(
    warm: Warm, jobs: dict[str, Job], tmp_path: Path, name: str, tell: Tell
) -> None:
    """Every seventh pair of a call and a fault."""
    sweep = swept(warm_runner(warm, jobs[name]), jobs[name], tmp_path, 7)
    tell(str(sweep))
    assert not sweep.bad, "\n".join(sweep.bad)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("train", 97), (MERGE, 41), (PREPARE, 41)])
def test_processes_that_start_cold_end_as_warm_ones_do(
    warm: Warm, jobs: dict[str, Job], tmp_path: Path, name: str, every: int, tell: Tell
) -> None:
    for runner, place in ((warm_runner(warm, jobs[name]), tmp_path / "warm"), (cold_runner, tmp_path / "cold")):
        place.mkdir()
        assert runner(jobs[name].arguments(place), None, None).code == 0
    assert not _difference(jobs[name].product(tmp_path / "warm"), jobs[name].product(tmp_path / "cold"))
    sweep = swept(cold_runner, jobs[name], tmp_path / "swept", every)
    tell(str(sweep))
    assert not sweep.bad, "\n".join(sweep.bad)
