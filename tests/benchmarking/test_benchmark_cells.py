"""A cell measures the loop's own steps, whatever becomes of it is a result, and measured ones are not run again."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from slow_cases import slow

from llamatune.benchmarking import cell_process as cell_module
from llamatune.benchmarking import cell_runs as run_module
from llamatune.benchmarking.cell_process import answer, run_cell
from llamatune.benchmarking.measure_cell import Task, Trial, resident_peak_bytes
from llamatune.benchmarking.run_benchmark import Benchmark, run_benchmark
from llamatune.command_options.preparation import PrepareOptions
from llamatune.command_options.training import BenchmarkOptions
from llamatune.data.prepare import prepare_data
from llamatune.demo.run_demo import MATERIAL
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError, Stopped
from llamatune.events import Event, Notice, ignore_event, never_stop
from llamatune.formats.benchmark_json import read_benchmark
from llamatune.spec import RunSpec, build_spec
from llamatune.training.inputs import open_inputs
from llamatune.training.train import train

Make = Callable[..., Path]


@pytest.fixture
def values(tiny_base: Make, prepared: Make) -> dict[str, Any]:
    """LoRA with dropout in fp32, windows of two micro-batches of three rows, and rows that are held out."""
    return {
        "model": {"path": str(tiny_base()), "dtype": "float32"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(prepared(validation_fraction=0.2))},
        "training": {
            "output_dir": "unused",
            "micro_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "lr_scheduler": "cosine",
            "precision": "fp32",
            "device": "cpu",
            "max_steps": 4,
        },
    }


@pytest.fixture
def spec(values: dict[str, Any]) -> RunSpec:
    return build_spec(values, "test")


@pytest.fixture
def spec_file(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def demo_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "prepared"
    tokenizer = MATERIAL / "base" / "tokenizer.model"
    prepare_data(PrepareOptions(rows=[MATERIAL / "instructions.jsonl"], tokenizer=tokenizer, output=output, limit=24))
    return output


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Cells answer in this process, which takes no time to start; the tasks that they were given."""
    asked: list[Task] = []

    def run(task: Task, directory: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
        if should_stop():
            raise Stopped("stopped by a signal")
        asked.append(task)
        return answer(request(task))

    monkeypatch.setattr(run_module, "run_cell", run)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # charts take seconds
    return asked


def request(task: Task) -> dict[str, Any]:
    return json.loads(json.dumps(task.request()))


def task(spec: RunSpec, steps: int | None = 4, seeds: tuple[int, ...] = (0,), limit: int | None = None) -> Task:
    return Task(spec, steps, seeds, limit)


def statuses(benchmark: Benchmark) -> list[str]:
    return [result["status"] for result in benchmark.results]


class TestWhatIsMeasured:
    @pytest.mark.parametrize("changes", [{}, {"training.num_epochs": "2", "training.max_steps": ""}])
    def test_losses_are_those_of_the_run_itself(
        self, values: dict[str, Any], tmp_path: Path, changes: dict[str, str]
    ) -> None:
        overrides = [f"{key}={value}" for key, value in changes.items()]
        overrides += [f"training.output_dir={tmp_path / 'run'}", "training.tokens_per_pass=null"]  # as cells do
        spec = build_spec(values, "test", overrides)
        found = answer(request(task(spec, None if changes else 4)))
        summary = train(spec)
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["event"] == "step"]
        assert found["steps"] == len(steps) == summary["steps"]
        assert found["losses"] == [steps[-1]["loss"]]
        assert found["held_out_losses"] == [[line["loss"] for line in lines if line["event"] == "eval"][-1]]
        assert found["warm_up_steps"] == min(3, len(steps) // 3)

    def test_each_seed_is_a_run_of_its_own(self, spec: RunSpec) -> None:
        both = answer(request(task(spec, seeds=(3, 5))))
        alone = [answer(request(task(spec, seeds=(seed,)))) for seed in (3, 5)]
        assert both["losses"] == [found["losses"][0] for found in alone]
        assert both["held_out_losses"] == [found["held_out_losses"][0] for found in alone]
        assert both["categories"] == alone[0]["categories"], "memory is the first seed's"

    def test_categories_add_up_to_the_peak(self, spec: RunSpec) -> None:
        found = answer(request(task(spec)))
        assert found["status"] == "measured"
        assert sum(found["categories"].values()) == found["allocated_bytes"]
        assert found["reserved_bytes"] is None
        assert 0 < found["allocated_bytes"] < found["resident_bytes"]
        assert found["tokens_per_second"] > 0
        assert found["step_s_range"][0] <= found["step_s"] <= found["step_s_range"][1]

    @pytest.mark.parametrize("lora", ["on", "off"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (8, 1), (1, 8)])
    @pytest.mark.parametrize("checkpointing", ["none", slow("every_2"), "block"])
    def test_the_plan_is_within_a_tenth_of_every_cell_of_the_default_grid(
        self, demo_rows: Path, lora: str, precision: str, batch: int, accumulation: int, checkpointing: str
    ) -> None:
        """On the base that ships with the package, one epoch, so that the heaviest rows are met."""
        training = {"output_dir": "unused", "precision": precision, "micro_batch_size": batch, "device": "cpu"}
        training |= {"gradient_accumulation_steps": accumulation, "activation_checkpointing": checkpointing}
        model = {"path": str(MATERIAL / "base"), "dtype": "float32"}
        values = {"model": model, "data": {"train": str(demo_rows)}, "training": training}
        spec = build_spec(values | ({"lora": {"r": 8}} if lora == "on" else {}), "test")
        found = answer(request(task(spec, -(-24 // (batch * accumulation)))))
        assert found["predicted_bytes"] == pytest.approx(found["allocated_bytes"], rel=0.1)

    def test_no_window_of_the_run_needs_more_than_the_heaviest_rows(self, spec: RunSpec) -> None:
        trial = Trial(spec, open_inputs(spec, False, ignore_event))
        trial.update(trial.schedule.passes(0), 0, 0)  # the optimizer's state is there from now on
        peaks = []
        for window in range(trial.schedule.windows_per_epoch):
            batches = trial.schedule.passes(window)
            with trial.meter(None) as meter:
                trial.update(batches, window, 1)
            peaks.append(meter.peak_bytes)
        assert len(set(peaks)) > 1, "rows of one length would show nothing"
        assert trial.measure_categories(1, None).peak_bytes >= max(peaks)

    def test_cells_of_few_steps_are_measured_on_the_same_rows(self, tmp_path: Path) -> None:
        """The first row is short. Accumulation meets the long one in its first step, and keeps gradients and ids."""
        prepared = self._rows(tmp_path, MATERIAL / "base", [1, 2, 1, 2, 60, 2, 1, 3, 2, 1], 200)
        found = {}
        for accumulation in (1, 8):
            training = {"output_dir": "unused", "precision": "fp32", "device": "cpu"}
            model = {"path": str(MATERIAL / "base"), "dtype": "float32"}
            data = {"train": str(prepared), "shuffle": False}
            values = {"model": model, "lora": {"r": 8}, "data": data,
                      "training": {**training, "gradient_accumulation_steps": accumulation}}  # fmt: skip
            found[accumulation] = answer(request(task(build_spec(values, "test"), 1)))
        one, eight = found[1], found[8]
        adapter_bytes, ids_bytes = 4 * one["trainable_parameters"], 2 * 8 * 10 * 200
        assert 0 <= eight["allocated_bytes"] - one["allocated_bytes"] <= 4 * adapter_bytes + ids_bytes
        assert one["categories"]["activations"] > 2 << 20, "that of the long row"

    @staticmethod
    def _rows(place: Path, base: Path, sentences: list[int], longest: int) -> Path:
        """Prepared texts of so many sentences of some 15 tokens, cut at ``longest``."""
        rows, words = place / "rows.jsonl", "the river of the town is long and the hill above it is high "
        rows.write_text("".join(json.dumps({"text": words * count}) + "\n" for count in sentences))
        prepare_data(PrepareOptions([rows], base / "tokenizer.model", place / "prepared", max_seq_length=longest))
        return place / "prepared"

    @pytest.mark.parametrize("longest", [128, 256, 257])
    @pytest.mark.parametrize("fused", [True, False])
    def test_the_plan_holds_for_short_rows_in_bf16_and_narrow_heads(
        self, tmp_path: Path, longest: int, fused: bool
    ) -> None:
        """Attention of samples up to 256 tokens is computed in fp32 there; heads have 8 numbers."""
        base = tmp_path / "base"
        base.mkdir()
        config = json.loads((MATERIAL / "base" / "config.json").read_text())
        config |= {"head_dim": 8, "num_attention_heads": 16, "num_key_value_heads": 16}
        (base / "config.json").write_text(json.dumps(config))
        (base / "tokenizer.model").symlink_to(MATERIAL / "base" / "tokenizer.model")
        values = {
            "model": {"path": str(base), "dtype": "float32", "init": "random"}, "lora": {"r": 8},
            "data": {"train": str(self._rows(tmp_path, base, [1, 3, 9, 60], longest))},
            "training": {"output_dir": "unused", "precision": "bf16", "device": "cpu", "fused": fused,
                         "gradient_accumulation_steps": 1},
        }  # fmt: skip
        spec = build_spec(values, "test")
        assert max(open_inputs(spec, False, ignore_event).prepared.train.lengths) == longest
        found = answer(request(task(spec, 2)))
        assert found["predicted_bytes"] == pytest.approx(found["allocated_bytes"], rel=0.02)

    def test_an_amount_of_memory_recomputes_and_auto_does_not(self, values: dict[str, Any]) -> None:
        def peak(*overrides: str) -> int:
            spec = build_spec(copy.deepcopy(values), "test", ["training.micro_batch_size=12", *overrides])
            return int(answer(request(task(spec, 1)))["allocated_bytes"])

        named, auto = peak("training.activation_checkpointing=block"), peak()
        assert named < auto == peak("training.memory_limit=1GiB")
        assert peak("training.memory_limit=1KB") == named

    def test_an_overflow_in_fp16_consumes_a_window_and_is_no_step(
        self, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = build_spec(values, "test", ["training.precision=fp16", "training.learning_rate=0.001"])
        outcomes = iter([None, True, None, True, True])
        update = Trial.update

        def overflowing(self: Trial, *arguments: Any) -> Any:
            made = next(outcomes, True) is not None
            return update(self, *arguments) if made else SimpleNamespace(made=False)

        monkeypatch.setattr(Trial, "update", overflowing)
        found = answer(request(task(spec, 3)))
        assert (found["steps"], found["skipped_windows"]) == (3, 2)


class TestWhatBecomesOfACell:
    def test_memory_limit_is_the_peak_to_the_byte(self, spec: RunSpec) -> None:
        peak = answer(request(task(spec)))["allocated_bytes"]
        assert answer(request(task(spec, limit=peak)))["status"] == "measured"
        short = answer(request(task(spec, limit=peak - 1)))
        assert short["status"] == "oom"
        assert f"{peak - 1:,} bytes are allowed" in short["reason"]
        assert answer(request(task(spec, limit=1000)))["status"] == "oom", "the weights alone are more"

    def test_what_does_not_fit_together_is_refused(self, values: dict[str, Any], prepared: Make) -> None:
        spec = build_spec(values, "test", [f"data.train={prepared()}", "evaluation.every_steps=1"])
        found = answer(request(task(spec)))
        assert (found["status"], found["exit_code"]) == ("refused", 2)
        assert "no validation data" in found["reason"]

    def test_a_loss_that_is_not_finite_is_a_failure(self, values: dict[str, Any]) -> None:
        found = answer(request(task(build_spec(values, "test", ["training.learning_rate=1e30"]))))
        assert (found["status"], found["exit_code"]) == ("failed", 6)

    @pytest.mark.parametrize(
        ("script", "status", "reason"),
        [
            ("kill -9 $$", "killed", "SIGKILL"),
            ("echo first >&2; echo the last line >&2; exit 3", "failed", "the last line"),
            ("exit 1", "failed", "no message"),
        ],
    )
    def test_a_child_that_dies_is_a_result(
        self, spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, reason: str
    ) -> None:
        monkeypatch.setattr(cell_module.sys, "executable", self.program(tmp_path, script))
        found = run_cell(task(spec), tmp_path, never_stop)
        assert found["status"] == status
        assert reason in found["reason"]
        assert not list(tmp_path.glob(".llamatune*"))

    def test_a_stop_ends_the_child(self, spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            cell_module.sys, "executable", self.program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
        )
        with pytest.raises(Stopped):
            run_cell(task(spec), tmp_path, lambda: (tmp_path / "pid").exists())
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)

    def program(self, directory: Path, script: str) -> str:
        path = directory / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)


class TestTheBenchmark:
    def test_a_measured_cell_is_not_run_again(self, spec_file: Path, tmp_path: Path, here: list[Task]) -> None:
        def run(*grid: str, **more: Any) -> Benchmark:
            return run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=grid, steps=2, **more))

        first = run("lora=off,on")
        assert (len(here), statuses(first)) == (2, ["measured"] * 2)
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert run("lora=off,on").payload() == first.payload()
        assert len(here) == 2
        after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert after == before
        run("lora=off,on", "training.activation_checkpointing=none,block")
        assert len(here) == 4, "two cells of the larger grid were there"
        run("lora=off,on", seeds=(1,))
        assert len(here) == 6, "another seed is another cell"
        run("lora=off,on", overwrite=True)
        assert len(here) == 8
        assert (tmp_path / "out.old-1").is_dir()

    def test_stopped_it_goes_on_where_it_was(self, spec_file: Path, tmp_path: Path, here: list[Task]) -> None:
        options = BenchmarkOptions(spec_file, output=tmp_path / "out", grid=["lora=off,on", "batch=1x1,1x2"], steps=2)
        with pytest.raises(Stopped, match="after 3 of 4 cells") as stopped:
            run_benchmark(options, should_stop=lambda: len(here) == 3)
        assert stopped.value.exit_code == 75
        left_by_a_kill = tmp_path / "out" / ".llamatune-cell-x"
        left_by_a_kill.mkdir()
        done = run_benchmark(options)
        assert (len(here), statuses(done)) == (4, ["measured"] * 4)
        assert not left_by_a_kill.exists()
        assert [dict(result["values"]) for result in done.results][1] == {"lora": "off", "batch": "1x2"}

    def test_killed_and_failed_cells_are_tried_again_and_out_of_memory_is_final(
        self, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outcomes: list[dict[str, Any]] = [
            {"status": "oom", "reason": "out of memory"},
            {"status": "killed", "reason": "killed (SIGKILL)"},
            {"status": "failed", "reason": "boom", "exit_code": 1},
        ]
        asked: list[Task] = []

        def run(task: Task, directory: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
            asked.append(task)
            return outcomes[{1: 0, 2: 1, 4: 2}[task.spec.training.micro_batch_size]]

        monkeypatch.setattr(run_module, "run_cell", run)
        options = BenchmarkOptions(
            spec_file, output=tmp_path / "out", grid=["training.micro_batch_size=1,2,4"], steps=2
        )
        assert statuses(run_benchmark(options)) == ["oom", "killed", "failed"]
        assert statuses(run_benchmark(options)) == ["oom", "killed", "failed"]
        assert [task.spec.training.micro_batch_size for task in asked] == [1, 2, 4, 2, 4]
        assert "failed (exit 1): boom" in (tmp_path / "out" / "benchmark.md").read_text()

    def test_refused_cells_stand_beside_measured_ones(self, spec_file: Path, tmp_path: Path, here: list[Task]) -> None:
        grid = ["lora=off,on", "model.dtype=bfloat16,float32"]
        done = run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=grid, steps=2))
        assert statuses(done) == ["refused", "measured", "measured", "measured"]
        assert len(here) == 3
        assert "refused: lora" not in (text := (tmp_path / "out" / "benchmark.md").read_text())
        assert "loses small updates" in text

    def test_an_axis_may_name_data_that_is_not_there(
        self, spec_file: Path, tmp_path: Path, here: list[Task], prepared: Make
    ) -> None:
        grid = [f"data.train={prepared()},{tmp_path / 'absent'}"]
        done = run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=grid, steps=2))
        assert statuses(done) == ["measured", "refused"]
        assert "no such directory" in done.results[1]["reason"]

    @pytest.mark.parametrize(
        ("overrides", "fault"),
        [(["model.path=absent"], CheckpointError), (["training.precison=fp32"], SpecError)],
    )
    def test_what_no_cell_can_begin_with_is_a_fault_before_anything_is_written(
        self, spec_file: Path, tmp_path: Path, here: list[Task], overrides: list[str], fault: type[Exception]
    ) -> None:
        with pytest.raises(fault):
            run_benchmark(BenchmarkOptions(spec_file, overrides, output=tmp_path / "out"))
        assert not here
        assert not (tmp_path / "out").exists()

    def test_somebody_elses_directory_is_left_alone(self, spec_file: Path, tmp_path: Path, here: list[Task]) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("all of it")
        with pytest.raises(EnvironmentFault):
            run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=["lora=on"], steps=2))
        assert not here
        run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=["lora=on"], steps=2, overwrite=True))
        assert (tmp_path / "out.old-1" / "thesis.tex").read_text() == "all of it"

    def test_without_matplotlib_there_is_a_notice_and_no_chart(
        self, spec_file: Path, tmp_path: Path, here: list[Task]
    ) -> None:
        events: list[Event] = []
        run_benchmark(BenchmarkOptions(spec_file, output=tmp_path / "out", grid=["lora=on"], steps=2), events.append)
        told = [event for event in events if isinstance(event, Notice) and "pip install matplotlib" in event.message]
        assert len(told) == 1
        assert sorted(path.name for path in (tmp_path / "out").glob("bench*")) == [
            "benchmark.csv", "benchmark.json", "benchmark.md"
        ]  # fmt: skip


def test_the_verb_measures_cells_in_processes_of_their_own(
    spec_file: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    arguments = ("benchmark", spec_file, "--grid", "lora=on,off", "model.dtype=bfloat16", "--steps", "2",
                 "--memory-limit", "1GiB", "--output", output)  # fmt: skip
    done = command(*arguments, "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [cell["status"] for cell in told["cells"]] == ["measured", "refused"]
    assert told["cells"][0]["threads"] == 1
    assert told["axes"] == [{"key": "lora", "values": ["on", "off"]}]
    assert "cell 1 of 2: lora=on: peak" in done.stderr
    assert json.loads((output / "benchmark.json").read_text())["cells"] == told["cells"]
    assert read_benchmark(output).cells == told["cells"]
    again = command(*arguments, "--layout", "nested")
    assert again.code == 0
    assert "Peak memory, MiB" in again.stdout
    assert f"tables and chart are in {output}" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--seeds", "0,0"], "no seeds"),
        (["--seeds", "x"], "no seeds"),
        (["--memory-limit", "40"], "no size"),
        (["--memory-limit", "0GiB"], "no size"),
        (["--layout", "round"], "flat or nested"),
        (["--preset-grid", "all"], "techniques and checkpointing"),
        (["--steps", "0"], "steps"),
        (["--grid", "lora"], "no axis"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(
    spec_file: Path, tmp_path: Path, command: Callable[..., Any], arguments: list[str], part: str
) -> None:
    done = command("benchmark", spec_file, "--output", tmp_path / "out", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_resident_set_is_this_processs_own() -> None:
    assert 50 << 20 < resident_peak_bytes() < 1 << 40
