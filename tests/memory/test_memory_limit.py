"""Recomputation chosen to fit: what is chosen, what it says, that it changes no bit, and what the summary holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_tools import StopAfter, assert_same_outcome, files, losses, make_spec, run_and_record
from step_tools import spec_of, step_bytes

from llamatune.errors import SpecError, Stopped
from llamatune.events import Notice
from llamatune.host_memory import free_host_bytes
from llamatune.memory.plan import heaviest_rows, largest, placed, plan_memory
from llamatune.memory.remedies import recomputed_share, remedies
from llamatune.memory.sizes import Rows
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.presets import PRESETS
from llamatune.shapes.recompute_levels import Recompute
from llamatune.spec import RunSpec
from llamatune.training.train import train
from llamatune.units import parse_size

SEVEN = PRESETS["llama-2-7b"]
ROWS = Rows((512,) * 8, 8 * 235)
GIB = 1 << 30


class TestTheChoice:
    def peak(self, levels: tuple[int, ...]) -> int:
        return step_bytes(spec_of(LINEAR_MODULES), SEVEN, ROWS, True, tuple(map(Recompute, levels))).peak

    def test_nothing_is_recomputed_where_everything_fits(self) -> None:
        plan = plan_memory(spec_of(LINEAR_MODULES), SEVEN, ROWS, True, 80 * GIB)
        assert plan.fits
        assert plan.levels == (0,) * 32

    @pytest.mark.parametrize("gib", [23.5, 20, 17, 16, 15, 14.6])
    def test_no_layer_could_recompute_less(self, gib: float) -> None:
        limit = int(gib * GIB)
        plan = plan_memory(spec_of(LINEAR_MODULES), SEVEN, ROWS, True, limit)
        assert plan.fits
        assert plan.levels is not None
        assert list(plan.levels) == sorted(plan.levels, reverse=True), "the last layers recompute least"
        assert any(plan.levels)
        for layer in range(32):  # raise each layer that may be: one step less than now, the order kept
            if plan.levels[layer] and (layer == 31 or plan.levels[layer + 1] < plan.levels[layer]):
                less = (*plan.levels[:layer], plan.levels[layer] - 1, *plan.levels[layer + 1 :])
                assert self.peak(less) > limit
        fewest = sum(level > 0 for level in plan.levels)
        assert self.peak((3,) * (fewest - 1) + (0,) * (33 - fewest)) > limit, "one layer less would not do"

    def test_what_cannot_fit_recomputes_everything_and_says_so(self) -> None:
        plan = plan_memory(spec_of(LINEAR_MODULES), SEVEN, ROWS, True, 10 * GIB)
        assert not plan.fits
        assert plan.levels == (3,) * 32

    def test_a_mode_set_by_hand_is_obeyed(self) -> None:
        plan = plan_memory(spec_of(LINEAR_MODULES, "feed_forward"), SEVEN, ROWS, True, 10 * GIB)
        assert plan.levels == (1,) * 32
        assert not plan.fits
        assert plan_memory(spec_of((), "none", dtype="float32"), SEVEN, ROWS, True, 10 * GIB).levels is None

    def test_more_recomputation_is_more_computation(self) -> None:
        shares = [recomputed_share(SEVEN, level) for level in Recompute]
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert shares[1] == pytest.approx(0.446 / 2, abs=0.001)  # gate and up are 44.6 % of a block
        assert shares[3] < 0.5, "down is never run again"


class TestRemedies:
    def test_each_lowers_the_peak_by_what_it_says(self) -> None:
        spec = spec_of(LINEAR_MODULES, dtype="float32", micro_batch_size=8, fused=False)
        plan = plan_memory(spec, SEVEN, ROWS, True, 30 * GIB)
        found = remedies(spec, SEVEN, plan, cuda=True)
        assert {remedy.change.partition("=")[0] for remedy in found} >= {
            "training.fused", "model.dtype", "training.micro_batch_size", "training.optimizer",
            "training.activation_checkpointing"}  # fmt: skip
        for remedy in found:
            assert remedy.saved_bytes > 0
            assert remedy.peak_bytes == plan.step.peak - remedy.saved_bytes
            assert remedy.fits == (remedy.peak_bytes <= 30 * GIB)
        changed = spec_of(LINEAR_MODULES, "block", dtype="float32", micro_batch_size=8, fused=False)
        block = next(remedy for remedy in found if remedy.change.endswith("=block"))
        assert block.peak_bytes == step_bytes(changed, SEVEN, ROWS, True).peak

    def test_what_is_on_is_not_proposed(self) -> None:
        spec = placed(spec_of(LINEAR_MODULES, "block", dtype="nf4", optimizer="adamw_8bit"), "host")
        plan = plan_memory(spec, SEVEN, Rows((40,), 20), True, 1)
        found = [remedy.change for remedy in remedies(spec, SEVEN, plan, cuda=True)]
        assert found == ["lora.r=8", "training.optimizer=sgd"]

    @pytest.mark.parametrize("true_answer", [0, 1, 2, 63, 64, 1000])
    def test_the_largest_that_fits(self, true_answer: int) -> None:
        assert largest(lambda number: number <= true_answer, 1000) == true_answer


class TestTheHeaviestMicroBatch:
    LENGTHS, TARGETS = (10, 80, 30, 80, 5), (4, 40, 10, 50, 2)

    def rows(self, **changes: object) -> Rows:
        spec = spec_of(LINEAR_MODULES)
        data = spec.data.model_copy(update=changes)
        spec = spec.model_copy(
            update={"data": data, "training": spec.training.model_copy(update={"micro_batch_size": 3})}
        )
        return heaviest_rows(self.LENGTHS, self.TARGETS, spec)

    def test_is_that_of_the_longest_rows(self) -> None:
        assert self.rows() == Rows((80, 80, 30), 100, 1)

    def test_packed_rows_are_full(self) -> None:
        assert self.rows(packing=True, packed_tokens=50).tokens == sum(self.LENGTHS)  # there are no more tokens
        assert self.rows(packing=True, packed_tokens=20).tokens == sum(self.LENGTHS)  # a row is as long as a sample
        many = heaviest_rows(self.LENGTHS * 100, self.TARGETS * 100, spec_with_packing(100))
        assert many.tokens == 100
        assert many.targets == round(100 * sum(self.TARGETS) / sum(self.LENGTHS))
        assert len(set(many.lengths)) > 1, "samples of a packed row differ"


def spec_with_packing(tokens: int) -> RunSpec:
    spec = spec_of(LINEAR_MODULES)
    data = spec.data.model_copy(update={"packing": True, "packed_tokens": tokens})
    return spec.model_copy(update={"data": data})


@pytest.mark.parametrize("text", ["lots", "24", "0GiB", "-1GiB", "24gib"])
def test_what_is_no_amount_of_memory_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="memory_limit"):
        make_spec(tmp_path, tmp_path, tmp_path, training__memory_limit=text)


class TestFreeMemory:
    def write(self, root: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    def test_without_a_group_it_is_what_the_machine_has(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   600 kB\n"})
        assert free_host_bytes(tmp_path) == 600 * 1024

    def test_a_parents_limit_counts_and_pages_of_files_make_room(self, tmp_path: Path) -> None:
        self.write(tmp_path, {
            "proc/meminfo": "MemAvailable: 1000000 kB\n", "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n", "sys/fs/cgroup/job/step/memory.current": "70000\n",
            "sys/fs/cgroup/job/memory.max": "100000\n", "sys/fs/cgroup/job/memory.current": "80000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 30000\nactive_file 7\n"})  # fmt: skip
        assert free_host_bytes(tmp_path) == 100000 - 80000 + 30000

    def test_the_older_kind_of_group(self, tmp_path: Path) -> None:
        top = "sys/fs/cgroup/memory/slurm/"
        self.write(tmp_path, {
            "proc/meminfo": "MemAvailable: 1000000 kB\n",
            "proc/self/cgroup": "5:cpu,cpuacct:/slurm\n4:memory:/slurm\n",
            top + "memory.limit_in_bytes": "50000", top + "memory.usage_in_bytes": "60000"})  # fmt: skip
        assert free_host_bytes(tmp_path) == 0

    def test_here_it_is_something(self) -> None:
        assert free_host_bytes() > 1 << 20


def tight_limit(spec: RunSpec, run: Path) -> str:
    """Between what a run needs that recomputes nothing and one that recomputes everything."""
    summary = json.loads((run / "summary.json").read_text())
    return f"{(summary['predicted_peak_memory_bytes'] - 20_000) / (1 << 10):.0f}KiB"


def test_a_tight_limit_recomputes_says_so_and_changes_no_bit(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    passes = {"training__tokens_per_pass": 512}  # chosen from the memory, they would differ
    free = make_spec(tiny_base(), prepared(), tmp_path / "free", training__memory_limit="1GiB", **passes)
    summary, events = run_and_record(free)
    assert summary["recomputed_layers"] == {
        "nothing": 3, "gate and up": 0, "q, k, v, gate and up": 0, "the whole block": 0}  # fmt: skip
    assert not [event for event in events if isinstance(event, Notice) and "recomputing" in event.message]
    limit = tight_limit(free, tmp_path / "free")
    tight, events = run_and_record(
        make_spec(tiny_base(), prepared(), tmp_path / "tight", training__memory_limit=limit, **passes)
    )
    assert tight["recomputed_layers"]["nothing"] < 3
    assert tight["predicted_peak_memory_bytes"] <= parse_size(limit, "")
    (notice,) = [event for event in events if isinstance(event, Notice) and "recomputing" in event.message]
    assert notice.kind == "info"
    assert "nothing in " in notice.message
    assert losses(tmp_path / "tight") == losses(tmp_path / "free")
    assert files(tmp_path / "tight" / "adapter") == files(tmp_path / "free" / "adapter")


def test_a_limit_that_nothing_can_meet_is_a_warning(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", training__memory_limit="1KiB")
    summary, events = run_and_record(spec)
    (notice,) = [event for event in events if isinstance(event, Notice) and event.kind == "warning"]
    assert "a step needs about" in notice.message
    assert "training." in notice.message, "it says what would help"
    assert summary["steps"] == 4


def test_a_run_may_go_on_with_other_levels(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    def spec(name: str, **changes: object) -> RunSpec:
        return make_spec(tiny_base(), prepared(), tmp_path / name, **changes)

    train(spec("whole"))
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec("stopped"), on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec("stopped", training__activation_checkpointing="projections", training__memory_limit="3GiB"))
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")


def test_the_summary_holds_the_prediction_beside_the_measurement(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    summary, _ = run_and_record(make_spec(tiny_base(), prepared(), tmp_path / "run"))
    assert summary["predicted_peak_memory_bytes"] == sum(summary["predicted_memory_bytes"].values())
    assert set(summary["predicted_memory_bytes"]) == {
        "weights", "adapter", "optimizer_state", "gradients", "activations", "temporary"}  # fmt: skip
    # Linux counts the peak in steps of some hundred KiB, and what is resident at a moment exactly.
    assert 0 < summary["memory_before_model_bytes"] <= summary["peak_memory_bytes"] + (2 << 20)


def test_a_predicted_peak_is_that_of_the_model_that_is_trained() -> None:
    config = LlamaConfig(64, 160, 3, 4, 2, 96)
    spec = spec_of((), dtype="float32", gradient_accumulation_steps=2)
    plan = plan_memory(spec, config, Rows((8,), 4), False, None)
    tensors = 3 * 9 + 3
    assert plan.step.weights == plan.step.gradients
    assert plan.step.optimizer_state == 2 * plan.step.weights + 4 * tensors  # AdamW counts the steps of each
