"""The end of a job on a clock of the tests, with the real loop: the run is saved in time, and not long before."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_tools import assert_same_outcome, make_spec

from llamatune import slurm_job_end
from llamatune.errors import SpecError, Stopped
from llamatune.events import Event, Notice, ignore_event, never_stop
from llamatune.inference.evaluate import HeldOutLoss
from llamatune.ranks import ALONE, Ranks
from llamatune.slurm_job_end import Clock
from llamatune.spec import build_spec
from llamatune.training import evaluation, loop, step_event
from llamatune.training.loop import TrainingLoop
from llamatune.training.stopping import Stopping
from llamatune.training.time_limit import SAVED_BEFORE_S, time_limit
from llamatune.training.train import train
from llamatune.training.training_step import Update
from llamatune.units import parse_duration

PASSES = 4


class TwoRanks(Ranks):
    """The first of two; the other asks for nothing."""

    rank, size = 0, 2

    def gather(self, value: Any) -> list[Any]:
        return [value, False if isinstance(value, bool) else value]


@dataclass
class Job:
    """An allocation of ``length_s``; ``skipped_s`` of it are passed over. Times are drawn by ``seed``.

    A step, a save and an evaluation take about so long, each other by ``noise`` (of a lognormal distribution); a save
    takes ``growth`` times as long as the one before.
    """

    seed: int
    length_s: float
    skipped_s: float
    step_s: float
    save_s: float
    eval_s: float = 0.0
    noise: float = 0.05
    growth: float = 1.0
    save_every: int | None = None
    eval_every: int | None = None
    ranks: Ranks = ALONE
    total_steps: int = 1 << 40
    now: float = 0.0
    wall_offset: float = 1.7e9
    slowed: Callable[[float], float] = lambda now: 1.0
    longest: dict[str, float] = field(default_factory=lambda: {"step": 0.0, "save": 0.0, "eval": 0.0})
    saved_at: list[float] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now + 1000.0, lambda: self.now + self.wall_offset)

    def drawn(self, kind: str, usual_s: float) -> float:
        seconds = usual_s * self.random.lognormvariate(0, self.noise) * self.slowed(self.now)
        self.longest[kind] = max(self.longest[kind], seconds)
        return seconds

    # What takes time

    def make_update(self, *words: Any) -> Update:
        stopping, seconds = words[5], self.drawn("step", self.step_s)
        for done in range(1, PASSES + 1):
            self.now += 0.95 * seconds / PASSES
            if self.ranks.size == 1 and done < PASSES and stopping.in_window(seconds / PASSES * (PASSES - done)):
                raise Stopped("in a window")
        stop = self.ranks.size > 1 and stopping.after_passes()
        self.now += 0.05 * seconds
        self.steps += 1
        return Update(True, 1.0, 10, 10, 1.0, 1.0, None, stop, 10, 0.0)

    def held_out_loss(self, *words: Any) -> HeldOutLoss:
        may_stop, seconds = words[5], self.drawn("eval", self.eval_s)
        for _ in range(20):
            if may_stop():
                raise Stopped("in an evaluation")
            self.now += seconds / 20
        return HeldOutLoss(1.0, 10, 0.5)

    def save(self, progress: Any) -> Path:
        self.now += self.drawn("save", self.save_s)
        self.save_s *= self.growth
        self.saved_at.append(self.now)
        return Path("step")

    def write(self, *words: Any) -> None:
        self.now += 0.3 * self.save_s

    # The run

    def run(self, monkeypatch: pytest.MonkeyPatch, on_event: Callable[[Event], None] = ignore_event) -> str:
        """Train until the run stops; the message. ``now`` is then the moment of its end."""
        output = SimpleNamespace(
            save_checkpoint=self.save, write_best=self.write, write_final=self.write, write_summary=ignore_event,
            log=ignore_event, log_durably=ignore_event, epochs=[], loss_at_start=lambda: None,
        )  # fmt: skip
        nothing: Callable[..., None] = lambda *words: None  # noqa: E731
        for name, value in {
            "make_update": self.make_update,  "run_companions": nothing,
            "RunOutput": lambda *words: output, "held_memory": nothing, "prune_checkpoints": nothing,
        }.items():  # fmt: skip
            monkeypatch.setattr(loop, name, value)
        monkeypatch.setattr(evaluation, "held_out_loss", self.held_out_loss)
        monkeypatch.setattr(step_event, "peak_memory_bytes", lambda device: 0)
        training: dict[str, Any] = {"output_dir": "run", "device": "cpu", "max_steps": self.total_steps,
                                    "learning_rate": 1e-4}  # fmt: skip
        values: dict[str, Any] = {"model": {"path": "m"}, "lora": {}, "data": {"train": "d"}, "training": training}
        training["save_every_steps"] = self.save_every
        values["evaluation"] = {"every_steps": self.eval_every, "at_start": False} if self.eval_every else {}
        spec = build_spec(values, "test")
        self.now += 0.02 * self.length_s
        limit = time_limit(spec.training, 10**8, self.clock, self.clock.monotonic(), on_event)
        self.now = max(self.now, self.skipped_s)
        schedule = SimpleNamespace(total_steps=self.total_steps, windows_per_epoch=10**9, num_epochs=1)
        schedule.passes = lambda window, rule: []
        learner = SimpleNamespace(
            parameters={},
            sharded=None,
            device=torch.device("cpu"),
            model=None,
            autocast=None,
            idle_forward=None,
            optimizer=SimpleNamespace(zero_grad=nothing),
        )
        inputs = SimpleNamespace(validation=[0] * 9 if self.eval_every else None)
        run = SimpleNamespace(passes=SimpleNamespace(lanes=None), path=Path("run"), changed_fields=())
        digests = SimpleNamespace(check=nothing, settle=lambda wholly, ask: True)
        stopping: Any = Stopping(never_stop, limit)
        parts: Any = (spec, inputs, schedule, learner, run, on_event, stopping, {}, None, digests, self.ranks)
        training_loop = TrainingLoop(*parts)
        training_loop.__dict__["_summary"] = lambda early_stop: {}
        training_loop.__dict__["_early_stop"] = lambda: None
        try:
            training_loop.execute()
        except Stopped as stop:
            return str(stop)
        return "finished"


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the variables of a job. scontrol says how much time is left; without an answer it is absent."""

    def start(job: Job, answer: Callable[[], float] | None = None, **variables: str) -> None:
        for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", slurm_job_end.END):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("PATH", "")
        if answer is None:
            variables.setdefault(slurm_job_end.END, str(int(job.wall_offset + job.length_s)))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        def run(command: list[str], **options: Any) -> SimpleNamespace:
            assert command[:4] == ["scontrol", "--oneliner", "show", "job"]
            if answer is None:
                raise FileNotFoundError(2, "No such file or directory")
            run_s = int(job.length_s - answer())
            times = f"RunTime={shown(run_s)} TimeLimit={shown(int(job.length_s))} TimeMin=N/A"
            record = f"JobId=7 JobName=a TimeLimit=1 JobState=RUNNING Reason=None Requeue=1 {times} SubmitTime=x"
            return SimpleNamespace(returncode=0, stdout=record.encode(), stderr=b"")

        monkeypatch.setattr(slurm_job_end.subprocess, "run", run)

    return start


def shown(seconds: int) -> str:
    """As scontrol shows a duration."""
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def drawn_job(seed: int) -> Job:
    """Of 20 minutes to two days, steps of 0.1 s to 60 s, saves of 0.2 s to 2 minutes that may grow."""
    draw = random.Random(seed)
    length_s = draw.choice([1200, 3600, 4 * 3600, 24 * 3600, 48 * 3600])
    step_s = min(10 ** draw.uniform(-1, 1.8), length_s / 60)
    save_s = min(10 ** draw.uniform(-0.7, 2.1), length_s / 60)
    job = Job(
        seed,
        length_s,
        max(0.0, length_s - 200 - draw.randint(30, 200) * step_s - draw.choice([0, 10]) * save_s),
        step_s,
        save_s,
        noise=draw.choice([0.01, 0.1, 0.3]),
        growth=draw.choice([1.0, 1.0, 1.1]),
        save_every=draw.choice([None, 40, 100]),
        ranks=draw.choice([ALONE, TwoRanks()]),
    )
    if draw.random() < 0.4:
        job.eval_every, job.eval_s = draw.choice([25, 60]), min(10 ** draw.uniform(0, 2.5), length_s / 30)
    return job


def test_two_hundred_job_ends(
    in_job: Callable[[Job], None], monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    """Saved at least 20 s before the end; unused 2 % of the job, or less than a step, a save or an evaluation needs."""
    shares, within, possible = list[float](), 0, 0
    for seed in range(200):
        job = drawn_job(seed)
        in_job(job)
        said = job.run(monkeypatch)
        assert "the job's time limit" in said, (job, said)
        assert job.saved_at, (job, said)
        left_s, unused_s = job.length_s - job.saved_at[-1], job.length_s - job.now
        assert left_s >= SAVED_BEFORE_S, (left_s, job)
        step, save, evaluation = job.longest.values()
        fitting_s = SAVED_BEFORE_S + 2.5 * step + 2.5 * save + (evaluation + 2.5 * save if job.eval_every else 0)
        assert unused_s <= max(0.02 * job.length_s, fitting_s), (unused_s, fitting_s, job, said)
        shares.append(unused_s / job.length_s)
        within, possible = within + (shares[-1] <= 0.02), possible + (fitting_s <= 0.02 * job.length_s)
    said = f"at most 2 % in {within} of 200, and in each of the {possible} whose steps and saves are shorter than that"
    tell(f"unused: median {sorted(shares)[100]:.2%}, {said}")


SHORT: dict[str, Any] = {"seed": 1, "length_s": 3600.0, "skipped_s": 3000.0, "step_s": 2.0, "save_s": 4.0}


def unused_s(job: Job) -> float:
    return job.length_s - job.now


@pytest.mark.parametrize("ranks", [ALONE, TwoRanks()], ids=["alone", "two ranks"])
@pytest.mark.parametrize("jump_s", [-7200.0, -30.0, 30.0, 7200.0])
def test_a_time_of_day_that_jumps_does_not_move_the_end(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch, jump_s: float, ranks: Ranks
) -> None:
    """Slurm's controller has its own clock, and says so."""
    job = Job(**SHORT, ranks=ranks)
    job.slowed = lambda now: setattr(job, "wall_offset", 1.7e9 + jump_s * (now > 3100)) or 1.0  # type: ignore[func-returns-value]
    in_job(job, lambda: job.length_s - job.now)
    assert "the job's time limit" in job.run(monkeypatch)
    assert SAVED_BEFORE_S <= unused_s(job) <= 36


@pytest.mark.parametrize("jump_s", [-7200.0, -30.0, 30.0])
def test_without_scontrol_a_jump_makes_the_end_earlier_at_most(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    job = Job(**SHORT)
    job.slowed = lambda now: setattr(job, "wall_offset", 1.7e9 + jump_s * (now > 3100)) or 1.0  # type: ignore[func-returns-value]
    in_job(job)
    job.run(monkeypatch)
    assert SAVED_BEFORE_S <= unused_s(job) <= 36 + max(0.0, jump_s)


def test_a_limit_that_was_raised_meanwhile_is_used(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable tells the old one; scontrol is asked again before the run stops."""
    job = Job(**SHORT)
    raised = lambda: (1800.0 if job.now > 3200 else 0.0) + job.length_s - job.now  # noqa: E731
    in_job(job, raised)
    job.run(monkeypatch)
    assert SAVED_BEFORE_S <= 1800 + unused_s(job) <= 36


def test_a_first_save_that_takes_long_is_in_time(in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is not known before. It comes early enough, and the run goes on where it took less than was feared."""
    for save_s, saves in ((200.0, 1), (1.0, 2)):
        job = Job(1, 3600.0, 2500.0, 2.0, save_s)
        in_job(job)
        job.run(monkeypatch)
        assert len(job.saved_at) == saves
        assert unused_s(job) >= SAVED_BEFORE_S
    assert unused_s(job) <= 36


def test_a_step_that_takes_twenty_times_as_long_is_given_up_in_time(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process looks at the time between the passes of a window too."""
    job = Job(**SHORT, save_every=20)
    job.slowed = lambda now: 20.0 if now > 3545 else 1.0
    job.noise, job.save_s = 0.0, 0.04
    in_job(job)
    job.run(monkeypatch)
    assert job.longest["step"] == 40
    assert SAVED_BEFORE_S <= unused_s(job) <= 36


def test_the_result_is_left_to_the_next_start_where_it_would_come_too_late(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {}
    for steps in range(250, 300, 4):
        job = Job(**SHORT, noise=0.0, total_steps=steps, save_every=100)
        in_job(job)
        ends[job.run(monkeypatch) == "finished"] = steps
        assert unused_s(job) >= SAVED_BEFORE_S
    assert set(ends) == {True, False}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({slurm_job_end.END: "1"}, "and SLURM_JOB_END_TIME is '1'"),  # of a job that has ended, whose shell this is
        ({slurm_job_end.END: "soon"}, "and SLURM_JOB_END_TIME is 'soon'"),
        ({slurm_job_end.END: ""}, "the end of job 7 is not known: scontrol does not run: No such file or directory"),
        (
            {slurm_job_end.END: "", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"},
            "the end of job 5_2 is not known",
        ),
    ],
)
def test_an_end_that_is_not_known_is_told_and_does_no_harm(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    job, notices = Job(**SHORT, total_steps=500), list[Event]()
    in_job(job, None, **variables)
    assert job.run(monkeypatch, notices.append) == "finished"
    (notice,) = (event for event in notices if isinstance(event, Notice))
    assert notice.kind == "warning"
    assert told in notice.message


@pytest.mark.parametrize(
    ("record", "left_s"),
    [
        ("JobState=RUNNING Reason=None RunTime=00:00:10 TimeLimit=00:02:00 TimeMin=N/A", 109),
        ("JobState=RUNNING Reason=None RunTime=1-00:00:00 TimeLimit=2-12:00:05 TimeMin=N/A", 129_604),
        ("JobState=RUNNING Reason=None RunTime=00:00:10 TimeLimit=UNLIMITED TimeMin=N/A", float("inf")),
        ("JobState=PENDING Reason=None RunTime=00:00:00 TimeLimit=00:02:00 TimeMin=N/A", "the job is PENDING"),
        ("JobState=RUNNING Reason=None RunTime=00:00:10 TimeLimit=soon TimeMin=N/A", "TimeLimit=soon"),
        ("slurm_load_jobs error", "no RunTime"),
    ],
)
def test_what_scontrol_says(record: str, left_s: float | str) -> None:
    if isinstance(left_s, str):
        with pytest.raises(slurm_job_end.JobEndUnknown, match=left_s):
            slurm_job_end.left_in(f"JobId=7 JobName=x {record}")
    else:
        assert slurm_job_end.left_in(f"JobId=7 JobName=a RunTime=9 {record} SubmitTime=y") == left_s


def test_a_scontrol_that_hangs_or_fails_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_job_end, "ANSWER_S", 0.2)
    for script, why in (("sleep 9", "no answer within 0.2 s"), ("echo gone >&2; exit 1", "scontrol failed: gone")):
        tool.write_text(f"#!/bin/sh\nexec sh -c '{script}'\n")
        tool.chmod(0o755)
        with pytest.raises(slurm_job_end.JobEndUnknown, match=why):
            slurm_job_end.SlurmJob("7").left_s()


class Ticking:
    """A clock that goes on by a random time whenever it is read."""

    def __init__(self, seed: int) -> None:
        self.random, self.now = random.Random(seed), 0.0

    def read(self) -> float:
        self.now += self.random.expovariate(1.0)
        return self.now


@pytest.mark.parametrize("seed", range(3))
def test_starts_of_max_time_end_in_the_same_bytes_as_one(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, seed: int
) -> None:
    """Stopped between windows, inside of them and in evaluations; the budget may be another at each start."""
    data = prepared(validation_fraction=0.3)
    changes: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "tokens_per_pass": None}
    changes = {f"training__{name}": value for name, value in changes.items()} | {"evaluation__every_steps": 2}
    train(make_spec(tiny_base(), data, tmp_path / "whole", **changes))
    starts, told, draw = 0, list[Event](), random.Random(seed)
    while True:
        starts += 1
        budget = f"{draw.randint(25, 60)}s"
        spec = make_spec(tiny_base(), data, tmp_path / "parts", training__max_time=budget, **changes)
        clock = Ticking(100 * seed + starts).read
        try:
            train(spec, on_event=told.append, clock=Clock(clock, clock))
            break
        except Stopped as stop:
            assert "before training.max_time after step" in str(stop)
        assert starts < 40
    assert starts > 2
    assert any(
        isinstance(event, Notice) and "until training.max_time: the run stops" in event.message for event in told
    )
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800), ("1-12:00:00", 129_600),
     ("2:00:00", 7200), ("5:30", 330), (45, 2700), ("45", 2700), ("1d 2h", 93_600)],
)  # fmt: skip
def test_a_time_is_read_as_people_and_slurm_write_it(text: str | int, seconds: float) -> None:
    spec = make_spec(Path("b"), Path("d"), Path("r"), training__max_time=text)
    assert spec.training.max_time is not None
    assert parse_duration(spec.training.max_time, "here") == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-5m", "5 minutes", "1:99", "inf", "m", 0, -1, 1.5, True, "9" * 400 + "d"]
)
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(SpecError, match="max_time"):
        make_spec(Path("b"), Path("d"), Path("r"), training__max_time=text)
