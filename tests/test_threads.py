"""Tiny work runs on one thread, larger work on torch's number, and a number that somebody chose is left alone."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune import threads
from llamatune.data.batches import open_prepared
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.presets import PRESETS
from llamatune.spec import RunSpec, build_spec
from llamatune.threads import current_core, mean_product, stay_on, suitable_threads, threads_for, usable_cores
from llamatune.training.schedule import pass_tokens

TINY = LlamaConfig(128, 352, 4, 4, 4, 1024)
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that torch started with four threads, nothing said in its environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_AT_START", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_average_product_is_of_all_products() -> None:
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 352) + 1024 * 128
    assert mean_product(TINY, 700) == pytest.approx(700 * weights / 29)
    assert mean_product(TINY, 1) == mean_product(TINY, 128)


def test_tiny_work_runs_on_one_thread_and_a_real_model_never(four_threads: None) -> None:
    assert threads_for(TINY, 16) == 1
    assert threads_for(TINY, 655) == 1
    assert threads_for(TINY, 16 * 512) == 4
    for config in PRESETS.values():
        assert threads_for(config, 1) == 4


def test_the_number_of_before_comes_back_after_a_fault_too(four_threads: None) -> None:
    with pytest.raises(ZeroDivisionError), suitable_threads(TINY, 1):
        assert torch.get_num_threads() == 1
        _ = 1 / 0
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environments_number_is_left_alone(four_threads: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4")
    with suitable_threads(TINY, 1):
        assert torch.get_num_threads() == 4


def test_a_callers_number_is_left_alone(four_threads: None) -> None:
    torch.set_num_threads(3)
    with suitable_threads(TINY, 1):
        assert torch.get_num_threads() == 3


def test_the_tokens_of_a_micro_batch_are_those_of_its_rows_or_of_a_full_packed_row(
    prepared: Callable[..., Path],
) -> None:
    path = prepared()
    train = open_prepared(path).train
    tokens, rows = sum(train.lengths), len(train)

    def spec(micro_batch_size: int, **data: Any) -> RunSpec:
        training = {"output_dir": "run", "num_epochs": 1, "micro_batch_size": micro_batch_size}
        values = {"model": {"path": "base"}, "lora": {}, "data": {"train": str(path), **data}, "training": training}
        return build_spec(values, "test")

    assert pass_tokens(spec(3), train) == pytest.approx(3 * tokens / rows)
    assert pass_tokens(spec(10 * rows), train) == tokens
    assert pass_tokens(spec(2, packing=True, packed_tokens=100), train) == 200


OBSERVED = """
import json, sys, torch
from llamatune.model.transformer import Transformer
seen, forward = set(), Transformer.forward
def watched(self, *more, **named):
    seen.add(torch.get_num_threads())
    return forward(self, *more, **named)
Transformer.forward = watched
from llamatune.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps({"before": torch.get_num_threads(), "seen": sorted(seen)}))
"""


def observed(*arguments: object, **environment: str) -> dict[str, Any]:
    """How many threads the passes of a verb ran on, and how many torch has outside."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", OBSERVED, *map(str, arguments)]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_training_generation_and_evaluation_of_a_tiny_model_take_one_thread(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    base, data, run = tiny_base(), prepared(), tmp_path / "run"
    spec = {
        "model": {"path": str(base)},
        "lora": {"r": 2},
        "data": {"train": str(data)},
        "training": {"output_dir": str(run), "max_steps": 2, "micro_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    verbs = [
        ("train", tmp_path / "run.yaml"),
        ("generate", "--model", base, "--prompt", "a red llama", "--max-new-tokens", 3),
        ("generate", "--model", base, "--prompt", "a red llama", "--max-new-tokens", 3, "--num-beams", 2),
        ("evaluate", "--model", base, "--data", data),
    ]
    for verb in verbs:
        found = observed(*verb)
        assert found["seen"] == [1], verb
        assert found["before"] > 1
    assert observed(*verbs[1], OMP_NUM_THREADS="2")["seen"] == [2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no cores of a thread to set")
def test_a_thread_stays_on_a_core_and_no_other_thread_does() -> None:
    allowed, found = os.sched_getaffinity(0), dict[str, set[int]]()
    core = current_core()
    assert core in allowed

    def stay(name: str, on: list[int]) -> None:
        stay_on(on)
        found[name] = os.sched_getaffinity(0)

    for name, on in (("core", [core]), ("none", list[int]()), ("absent", [1 << 14])):
        thread = threading.Thread(target=stay, args=(name, on))
        thread.start()
        thread.join()
    assert found == {"core": {core}, "none": allowed, "absent": allowed}
    assert os.sched_getaffinity(0) == allowed


_HELPERS = """
import os, time, torch
from llamatune.threads import _openmp_pauses, release_threads
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
before, x = count(), torch.ones(600, 600)
y = x @ x
during = count()
release_threads()
deadline = time.monotonic() + 20
while count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(_openmp_pauses()), during - before, count() - before, torch.equal(x @ x, y), count() - before)
"""


def test_released_threads_end_and_come_again() -> None:
    """In a process of its own, with torch's OpenMP as the only one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", _HELPERS], env=environment, capture_output=True, text=True, check=True)
    libraries, during, after, same, again = done.stdout.split()
    if libraries == "0":
        pytest.skip("torch's OpenMP is not libgomp")
    assert (during, after, same, again) == ("2", "0", "True", "2")


def test_usable_cores_are_those_of_the_affinity_from_the_current_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {9, 2, 5, 4}, raising=False)
    for core, found in ((5, [5, 9, 2, 4]), (2, [2, 4, 5, 9]), (3, [2, 4, 5, 9]), (None, [2, 4, 5, 9])):
        monkeypatch.setattr(threads, "current_core", lambda core=core: core)
        assert usable_cores() == found
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == []
