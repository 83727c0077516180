"""Checkpoints that several ranks write together: read on any number of ranks, whole or not at all, never mixed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tools import launch, run_ranks
from run_tools import last_checkpoint, metrics
from safetensors.torch import load_file, save_file
from slow_cases import slow
from tracing import changing_calls, fault_options, record_options
from warm import NO_STRACE, Warm, strace

from llamatune.checkpoints.sharded_checkpoint import StoredTensors, shard_files
from llamatune.errors import CheckpointError
from llamatune.formats.manifest import find_manifest, verify_product

STEPS = 8
CLOSE = 1e-5
Command = list[str]
RULES = {"adamw": {}, "adamw_8bit": {"training__optimizer": "adamw_8bit"}, "momentum": {
    "training__optimizer": "sgd", "training__momentum": 0.9}}  # fmt: skip


@pytest.fixture
def command(rank_job: Callable[..., Command]) -> Callable[..., Command]:
    """Up to a number of steps; more of them continue the run."""

    def write(run: Path, steps: int = STEPS, **changes: Any) -> Command:
        job = rank_job(
            lora=None, training__max_steps=steps, training__save_every_steps=2, training__learning_rate=0.003,
            training__keep_last=9, training__rank_timeout_s=6.0, data__validation=None, evaluation={}, **changes,
        )  # fmt: skip
        return [*job, f"training.output_dir={run}"]

    return write


@pytest.fixture
def whole(warm_ranks: Warm, command: Callable[..., Command], tmp_path: Path) -> Callable[..., Path]:
    """The run of one process that nothing disturbed."""

    def train(**changes: Any) -> Path:
        run = tmp_path / "whole"
        run_ranks(warm_ranks, command(run, **changes), 1)
        return run

    return train


def judge(run: Path, whole: Path, limit: float = CLOSE) -> None:
    """Every step once, with the numbers of the undisturbed run; the same weights; no leftovers."""
    found, expected = metrics(run, "step"), metrics(whole, "step")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=limit)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, whole))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() < limit * tensor.norm()
    assert not [path for path in run.rglob("*") if path.name.startswith((".llamatune-tmp-", ".trash-"))]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of several ranks, whole and flat."""
    runs: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("shard-*"):
        for name, tensor in load_file(file).items():
            whole, _, begin = name.rpartition("@")
            assert int(begin) not in runs.setdefault(whole, {})
            runs[whole][int(begin)] = tensor
    return {name: torch.cat([parts[begin] for begin in sorted(parts)]) for name, parts in runs.items()}


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [((2, 4, 1, 3), "adamw_8bit"), ((1, 4), "adamw"), slow((4, 2, 1, 2), "momentum"), slow((3, 1, 2, 4), "adamw")],
)
def test_a_run_goes_on_with_other_numbers_of_ranks(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path,
    sizes: tuple[int, ...], rule: str,
) -> None:  # fmt: skip
    run, each = tmp_path / "run", STEPS // len(sizes)
    for place, size in enumerate(sizes):
        run_ranks(warm_ranks, command(run, each * (place + 1), **RULES[rule]), size)
    judge(run, whole(**RULES[rule]))
    for place, size in enumerate(sizes):
        saved = run / "checkpoints" / f"step-{each * (place + 1):06d}"
        assert len(list(saved.glob("shard-*"))) == (0 if size == 1 else size)
        verify_product(saved)


def test_shards_are_the_tensors_of_one_process(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing twice, nothing missing, and 1/R in each file."""
    run = tmp_path / "run"
    run_ranks(warm_ranks, command(run, 2, **RULES["adamw_8bit"]), 4)
    checkpoint = whole(**RULES["adamw_8bit"]) / "checkpoints" / "step-000002"
    expected = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = tensors_of(last_checkpoint(run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, (tensor.numel(),)), name
        if tensor.dtype == torch.float32:
            assert (found[name] - tensor.view(-1)).norm() <= 1e-4 * tensor.norm(), name
        else:
            assert (found[name] != tensor.view(-1)).float().mean() < 0.01, name
    sizes = [file.stat().st_size for file in last_checkpoint(run).glob("shard-*")]
    assert max(sizes) < 0.4 * sum(sizes)


def test_stale_shards_are_not_read(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Files of another number of ranks that lie in a checkpoint, and one in which its manifest names both."""
    run, other = tmp_path / "run", tmp_path / "other"
    run_ranks(warm_ranks, command(run, 4), 2)
    run_ranks(warm_ranks, command(other, 2, training__seed=5), 4)
    checkpoint = last_checkpoint(run)
    for shard in last_checkpoint(other).glob("shard-*"):
        shutil.copy(shard, checkpoint)
    run_ranks(warm_ranks, command(run), 4)
    judge(run, whole())
    manifest = json.loads((checkpoint / "llamatune.json").read_text())
    stale = json.loads((last_checkpoint(other) / "llamatune.json").read_text())
    manifest["files"] |= {name: entry for name, entry in stale["files"].items() if name.startswith("shard-")}
    (checkpoint / "llamatune.json").write_text(json.dumps(manifest))
    found = find_manifest(checkpoint)
    assert found is not None
    with pytest.raises(CheckpointError, match="not those of one number of ranks"):
        shard_files(found)


@pytest.mark.parametrize(
    "parts", [{"w@0": 4, "w@5": 3}, {"w@0": 4, "w@3": 3}, {"w@2": 4}, {"w": 4}, {"w@-1": 4}, {"w@x": 4}, {"@0": 4}]
)
def test_runs_that_do_not_make_a_tensor_are_refused(tmp_path: Path, parts: dict[str, int]) -> None:
    save_file({name: torch.zeros(count) for name, count in parts.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"overlap or leave a gap|no run of a tensor"):
        StoredTensors(tmp_path, ["x.safetensors"], True)


def test_the_state_of_another_optimizer_is_refused(
    warm_ranks: Warm, command: Callable[..., Command], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(warm_ranks, command(run, 2), 2)
    checkpoint = last_checkpoint(run)
    stored = StoredTensors(checkpoint, sorted(file.name for file in checkpoint.glob("shard-*")), True)
    name = sorted(stored.weights())[0]
    assert stored.fits(f"{name}/exp_avg", torch.float32, 131 * 32 if "embed" in name or "head" in name else 32)
    assert not stored.fits(f"{name}/exp_avg", torch.uint8, 131 * 32)
    assert not stored.fits(f"{name}/momentum_buffer", torch.float32, 131 * 32)


def test_a_damaged_shard_costs_one_checkpoint(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(warm_ranks, command(run, 4), 2)
    shard = last_checkpoint(run) / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    end = launch(warm_ranks, command(run), 3).ended()
    assert end.codes == [0, 0, 0], end
    assert any("skipped" in line and shard.name in line for line in end.said)
    judge(run, whole())


# Kills and faults


def disturbed(
    warm: Warm, command: Callable[..., Command], whole: Path, scratch: Path, times: int, seed: int
) -> Counter[str]:
    """SIGKILL to a random rank at a random moment, on 1 to 4 ranks; earlier checkpoints stay whole."""
    chance, seen, done, runs = random.Random(seed), Counter[str](), 0, 0
    while done < times:
        run, runs = scratch / f"run-{runs}", runs + 1
        for left in range(4, -1, -1):
            size = chance.choice((1, 2, 3, 4))
            launched = launch(warm, command(run), size)
            rank = chance.randrange(size)
            if left and not launched.processes[rank].ended_within(chance.uniform(0.1, 1.5)):
                launched.signal(rank, signal.SIGKILL)
            end = launched.ended(90)
            others = {code for place, code in enumerate(end.codes) if place != rank}
            assert others <= {0} or others <= {5}, (size, rank, end)
            assert len(end.errors) <= 1, (size, rank, end)
            done += end.codes[rank] != 0
            for saved in (run / "checkpoints").glob("step-*"):
                verify_product(saved)
            seen[f"{size} ranks, {'killed' if end.codes[rank] else 'ended'}"] += 1
            if set(end.codes) == {0}:
                break
        judge(run, whole)
    return seen


@pytest.mark.parametrize("times", [1, slow(30)])
def test_kills_at_random_moments(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path, times: int,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    tell(str(dict(disturbed(warm_ranks, command, whole(), tmp_path, times, 7))))


@pytest.mark.skipif(strace() is None, reason=NO_STRACE)
@pytest.mark.parametrize(
    ("rank", "fault", "step"),
    [(1, "kill", 31), slow(1, "kill", 1), slow(0, "kill", 1), slow(1, "ENOSPC", 1), slow(0, "ENOSPC", 1)],
)
def test_a_fault_at_the_calls_of_a_ranks_save(
    warm_ranks: Warm, command: Callable[..., Command], whole: Callable[..., Path], tmp_path: Path, rank: int,
    fault: str, step: int,
) -> None:  # fmt: skip
    """Before each call (or each ``step``-th) that changes the second checkpoint; then the run goes on."""
    log, traced, expected = tmp_path / "log", tmp_path / "traced", whole()
    traced.mkdir()
    run_ranks(warm_ranks, command(traced / "run"), 2, own={rank: {"tracing": record_options(), "log": log}})
    saving = [call for call in changing_calls(log, traced) if "step-000004" in call.text]
    assert len(saving) > 3
    for number, call in enumerate(saving[1::step]):
        place = tmp_path / "place"
        own = {rank: {"tracing": fault_options(call, fault), "log": log}}
        end = launch(warm_ranks, command(place / "run"), 2, own).ended()
        assert len(end.errors) == (set(end.codes) != {0}), end
        if fault == "kill":
            assert end.codes == [-signal.SIGKILL if place == rank else 5 for place in range(2)], end
        else:
            assert end.codes in ([5, 5], [0, 0]), end
        for saved in (place / "run" / "checkpoints").glob("step-*"):
            verify_product(saved)
        run_ranks(warm_ranks, command(place / "run"), (1, 2, 4)[number % 3])
        judge(place / "run", expected)
        shutil.rmtree(place)
