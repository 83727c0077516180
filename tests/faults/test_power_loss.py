"""Whatever a power cut leaves of what was not yet synced, the same command ends in the same bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, building, names_below, training
from power_loss import Recording, Said, Tree, recording_options, restore, snapshot, states
from warm import NO_STRACE, Warm, strace

Tell = Callable[[str], None]

pytestmark = pytest.mark.skipif(strace() is None, reason=NO_STRACE)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def recorded(warm: Warm, job: Job, place: Path, broken: str | None = None) -> Recording:
    """One more run at ``place``, call by call."""
    before, log = snapshot(place), place.with_name("strace.log")
    ended = warm.run(job.arguments(place), tracing=recording_options(), log=log, broken=broken)
    assert ended.code == 0, ended.stderr
    recording = Recording(place, before)
    recording.read(log)
    return recording


def survives(warm: Warm, job: Job, place: Path, tree: Tree, said: str, expected: Any, names: list[str]) -> str:
    """What is wrong when the run is started again on what is left; nothing, if all is well."""
    restore(tree, place)
    if job.whole_or_none and job.product(place) not in (None, expected):
        return "half a product"
    if "{" in said and job.product(place) != expected:
        return "the result was told, and is not there"
    again = warm.run(job.arguments(place), loss_scale=job.loss_scale)
    if again.code != 0:
        return f"exit code {again.code}: {again.stderr[-500:]}"
    promised = max(map(int, re.findall(r"saved step=(\d+)", said)), default=0)
    resumed = re.search(r"resumed_step=(\d+)", again.stderr)
    if resumed is not None and int(resumed[1]) < promised:
        return f"step {promised} was told to be saved, and the run resumes at {resumed[1]}"
    found = job.product(place)
    if found != expected:
        return f"another outcome: {[key for key in expected if found is None or found.get(key) != expected[key]]}"
    if resumed is not None and names_below(place) != names:
        return f"other names: {sorted(set(names_below(place)) ^ set(names))}"
    return ""


def swept(
    warm: Warm, job: Job, recording: Recording, place: Path, tell: Tell, most: int | None = None, first: int = 0
) -> list[str]:
    """Start again in each state, or in the ``first`` ones and in so many others, evenly spread: what was wrong."""
    expected, names = job.product(recording.place), names_below(recording.place)
    assert expected
    found = list(states(recording))
    rest = found[first:]
    chosen = found if most is None else found[:first] + [rest[n * len(rest) // most] for n in range(most)]
    bad = []
    for which, tree, said in chosen:
        if wrong := survives(warm, job, place, tree, said, expected, names):
            bad.append(f"{which}: {wrong}")
        shutil.rmtree(place)
    tell(f"{len(chosen)} of {len(found)} states after a power loss, {len(bad)} bad outcomes")
    return bad


@pytest.fixture
def train(job_file: Callable[..., tuple[str, ...]]) -> Job:
    """Steps that improve the validation loss twice, so that best/ is made and replaced."""
    return training(job_file(training__learning_rate=0.05, training__tokens_per_pass=None))


@pytest.fixture
def merge(warm: Warm, train: Job, small_base: Path, tmp_path: Path) -> Job:
    assert warm.run(train.arguments(tmp_path / "adapter")).code == 0
    adapter = tmp_path / "adapter" / "run" / "adapter"
    return building(("merge-lora", "--model", str(small_base), "--adapter", str(adapter), "--json"))


@pytest.fixture
def prepare(tiny_rows: Path, tiny_tokenizer: Path) -> Job:
    rows = ("prepare-data", str(tiny_rows), "--tokenizer", str(tiny_tokenizer), "--skip-bad-rows", "99", "--json")
    return building((*rows, "--validation-fraction", "0.2"))


@pytest.fixture(params=["train", "merge", "prepare"])
def job(request: pytest.FixtureRequest) -> Job:
    found: Job = request.getfixturevalue(request.param)
    return found


def test_the_operations_of_a_recorded_run_give_the_tree_that_it_left(warm: Warm, job: Job, place: Path) -> None:
    recording = recorded(warm, job, place)
    whole = recording.after(len(recording.operations), "all", "all")

    def without_lock(tree: Tree) -> Tree:
        return {path: content for path, content in tree.items() if not path.endswith(".lock")}

    assert without_lock(whole) == without_lock(snapshot(place))


def test_what_the_user_was_told_to_be_there_is_durable_by_then(warm: Warm, job: Job, place: Path) -> None:
    """With every directory on the way to it; of what is not synced nothing is counted on."""
    recording, told = recorded(warm, job, place), 0
    for moment, operation in enumerate(recording.operations):
        if isinstance(operation, Said):
            saved = re.search(r" saved step=(\d+)", operation.text)
            product = "out" if job.whole_or_none else "run/adapter"
            name = f"run/checkpoints/step-{int(saved[1]):06d}" if saved else product
            left, whole = (recording.after(moment, names, data) for names, data in (("none", "lost"), ("all", "all")))
            assert left[f"{name}/llamatune.json"] == whole[f"{name}/llamatune.json"]
            told += 1
    assert told == (1 if job.whole_or_none else 5)


def test_what_some_power_cuts_leave_is_enough(warm: Warm, job: Job, place: Path, tmp_path: Path, tell: Tell) -> None:
    """The first states are those in which a directory begins to be a run's."""
    recording = recorded(warm, job, place)
    assert swept(warm, job, recording, tmp_path / "again", tell, 10, first=14) == []


def test_a_writer_that_does_not_sync_is_caught(warm: Warm, merge: Job, place: Path, tmp_path: Path, tell: Tell) -> None:
    """The positive control."""
    recording = recorded(warm, merge, place, "unsynced")
    assert any("half a product" in line for line in swept(warm, merge, recording, tmp_path / "again", tell, 10))


@pytest.mark.slow
def test_what_any_power_cut_leaves_is_enough(warm: Warm, job: Job, place: Path, tmp_path: Path, tell: Tell) -> None:
    recording = recorded(warm, job, place)
    assert swept(warm, job, recording, tmp_path / "again", tell) == []


@pytest.mark.slow
def test_what_power_cuts_leave_of_a_resumed_run_is_enough(
    warm: Warm, train: Job, place: Path, tmp_path: Path, tell: Tell
) -> None:
    """Its log is cut before it grows again, and leftovers are removed."""
    whole = recorded(warm, train, place)
    restore(_state_with(whole, ".trash-step"), tmp_path / "cut")
    resumed = recorded(warm, train, tmp_path / "cut")
    assert swept(warm, train, resumed, tmp_path / "again", tell, 250) == []


def _state_with(recording: Recording, name: str) -> Tree:
    return next(tree for _, tree, _ in states(recording) if any(name in path for path in tree))
