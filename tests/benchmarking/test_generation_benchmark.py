"""Generation is timed in the engine, its bytes are those of brute force, and its cells go on where they stopped."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.benchmarking import bandwidth, cell_runs
from llamatune.benchmarking.bandwidth import memory_bandwidth, step_weight_bytes, tensors_of, tokens_looked_at
from llamatune.benchmarking.cell_process import answer
from llamatune.benchmarking.generation_tables import generation_csv, generation_table
from llamatune.benchmarking.measure_generation import GenerationTask, random_prompts, time_batch
from llamatune.benchmarking.run_generation import GenerationBenchmark, run_generation_benchmark
from llamatune.command_options.inference import ModelSource
from llamatune.command_options.training import BenchmarkOptions
from llamatune.errors import CheckpointError, OutOfMemory, SpecError, Stopped
from llamatune.events import ignore_event, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine
from llamatune.inference.model_source import open_model
from llamatune.model.transformer import Transformer
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec_grid import Axis

Make = Callable[..., Path]
BUFFER = 1 << 20


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", BUFFER)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[GenerationTask]:
    """Cells answer in this process; the tasks that they were given."""
    asked: list[GenerationTask] = []

    def run(task: GenerationTask, directory: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
        if should_stop():
            raise Stopped("stopped by a signal")
        asked.append(task)
        return answer(json.loads(json.dumps(task.request())))

    monkeypatch.setattr(cell_runs, "run_cell", run)
    return asked


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Completion]:
    """What engines complete."""
    completed: list[Completion] = []
    step = Engine.step

    def stepping(engine: Engine) -> list[tuple[int, Completion]]:
        ended = step(engine)
        completed.extend(completion for _, completion in ended)
        return ended

    monkeypatch.setattr(Engine, "step", stepping)
    return completed


def task(model: Path, rows: int = 3, prompt: int = 7, new: int = 5, **source: Any) -> GenerationTask:
    return GenerationTask(ModelSource(model=model, device="cpu", **source), rows, prompt, new, 2)


def measured(asked: GenerationTask) -> dict[str, Any]:
    found = answer(json.loads(json.dumps(asked.request())))
    assert found["status"] == "measured", found
    return found


def loaded(model: Path, **source: Any) -> Transformer:
    opened = open_model(ModelSource(model=model, device="cpu", **source))
    return opened.load(ignore_event, never_stop).by_prefix[""]


class TestACell:
    def test_a_task_comes_back_from_json(self, tmp_path: Path) -> None:
        for adapter in (None, tmp_path / "adapter"):
            asked = task(tmp_path, dtype="nf4", adapter=adapter, force_base=True)
            assert GenerationTask.of_request(json.loads(json.dumps(asked.request()))) == asked

    def test_speeds_are_tokens_over_the_seconds_of_each_repetition(self, tiny_base: Make) -> None:
        found = measured(task(tiny_base()))
        one, other = found["seconds"]
        prefill = [3 * 7 / batch["prefill"] for batch in (one, other)]
        decode = [3 * 4 / batch["decode"] for batch in (one, other)]
        assert found["prefill_tokens_per_second"] == pytest.approx(sum(prefill) / 2)
        assert found["decode_tokens_per_second"] == pytest.approx(sum(decode) / 2)
        assert found["decode_deviation"] == pytest.approx(abs(decode[0] - decode[1]) / 2**0.5)
        assert found["first_token_s"] == pytest.approx((one["first_token"] + other["first_token"]) / 2)
        steps_a_second = found["decode_tokens_per_second"] / 3
        limit = found["bandwidth_bytes_per_second"] / found["step_read_bytes"]
        assert found["bandwidth_fraction"] == pytest.approx(steps_a_second / limit, rel=1e-4)

    @pytest.mark.parametrize("rows", [1, 3, 16])
    def test_the_time_of_reading_prompts_is_prefill_and_all_else_is_decoding(
        self, tiny_base: Make, monkeypatch: pytest.MonkeyPatch, made: list[Completion], rows: int
    ) -> None:
        """By a clock that counts passes: one that reads prompts takes 100 s, one that decodes 1 s."""
        now, forward = [0.0], Transformer.forward

        def counting(*arguments: Any, **more: Any) -> Any:
            now[0] += 1 if more.get("lengths") is None else 100
            return forward(*arguments, **more)

        monkeypatch.setattr(Transformer, "forward", counting)
        monkeypatch.setattr("llamatune.benchmarking.measure_generation.clock", lambda device: now[0])
        monkeypatch.setattr("llamatune.inference.engine.tokens_in_a_pass", lambda *_: 2048)
        found = time_batch(loaded(tiny_base()), random_prompts(131, rows, 512), 6)
        passes = -(-rows * 512 // 2048)
        assert (found.prefill, found.decode) == (100 * passes, 5)
        assert found.first_token == sum(100 * (1 + row // 4) for row in range(rows)) / rows
        assert [(len(completion.ids), completion.finish_reason) for completion in made] == [(6, "length")] * rows

    def test_no_token_ends_a_row(self, tiny_base: Make, made: list[Completion]) -> None:
        model = loaded(tiny_base(eos_token_id=0))
        with torch.no_grad():
            model.lm_head.weight.zero_()  # the first of equal logits is the largest
        time_batch(model, [[1, 5, 9]], 6)
        assert [completion.ids for completion in made] == [[0] * 6]

    def test_memory_holds_weights_and_cache_and_little_more(self, tiny_base: Make) -> None:
        found = measured(task(tiny_base(), rows=8, prompt=200, new=56, dtype="float32"))
        model = loaded(tiny_base(), dtype="float32")
        assert found["weights_bytes"] == sum(4 * parameter.numel() for parameter in model.parameters())
        assert found["cache_bytes"] == 2 * 3 * 2 * 8 * 4 * 8 * 255
        held = found["weights_bytes"] + found["cache_bytes"]
        assert held < found["allocated_bytes"] < found["resident_bytes"]
        assert found["reserved_bytes"] is None

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "nf4"])
    def test_cells_of_every_dtype(self, tiny_base: Make, dtype: str) -> None:
        found = measured(task(tiny_base(), dtype=dtype))
        assert found["held_in"] == dtype
        assert found["threads"] == torch.get_num_threads()

    def test_packed_weights_count_as_they_are_held(self, tiny_base: Make) -> None:
        sizes = [measured(task(tiny_base(), dtype=dtype))["step_read_bytes"] for dtype in ("bfloat16", "int8", "nf4")]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3

    def test_what_runs_out_of_memory_or_fails_is_a_result(
        self, tiny_base: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def full(*arguments: Any) -> None:
            raise MemoryError

        asked = task(tiny_base())
        monkeypatch.setattr(Engine, "step", full)
        found = answer(json.loads(json.dumps(asked.request())))
        assert (found["status"], found["exit_code"]) == ("oom", OutOfMemory.exit_code)
        assert "use fewer --rows" in found["reason"]
        assert answer(json.loads(json.dumps(task(tmp_path / "absent").request())))["status"] == "refused"


class TestBytesOfAStep:
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_step_reads_all_weights_but_rows_of_the_embedding(self, tiny_base: Make, tied: bool) -> None:
        model = loaded(tiny_base(tie_word_embeddings=tied), dtype="float32")
        whole = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed_tokens" not in name)
        embedding = model.model.embed_tokens.weight
        assert step_weight_bytes(model, 5) == 4 * (whole + (131 if tied else 5) * embedding.shape[1])
        assert len(tensors_of(model)) == len({id(parameter) for parameter in model.parameters()})

    def test_an_adapter_is_read_too(self, tiny_base: Make, peft_adapter: Make) -> None:
        base = tiny_base()
        adapter = peft_adapter(base)
        more = step_weight_bytes(loaded(base, adapter=adapter), 1) - step_weight_bytes(loaded(base), 1)
        assert more > 0

    @pytest.mark.parametrize("window", [None, 6, 100])
    def test_keys_that_are_looked_at(self, window: int | None) -> None:
        config = LlamaConfig(48, 100, 3, 6, 2, 131, sliding_window=window)
        steps = [min(length, window or 1000) for length in range(6, 6 + 8)]  # 5 of the prompt and the first new one
        assert tokens_looked_at(config, 5, 9) == sum(steps) / len(steps)

    def test_the_bandwidth_is_that_of_the_fastest_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a clock on which each way takes its time: the copy moves twice as much in as long as the others."""
        times = iter([0.0, 2.0] * 3 * bandwidth._TRIES)
        monkeypatch.setattr(bandwidth, "clock", lambda device: next(times))
        assert memory_bandwidth(torch.device("cpu")) == 2 * BUFFER / 2
        assert next(times, None) is None

    def test_the_bandwidth_of_this_machine(self) -> None:
        assert 1e7 < memory_bandwidth(torch.device("cpu")) < 1e14


class TestTheGrid:
    def options(self, model: Path, output: Path, **more: Any) -> BenchmarkOptions:
        given = {"rows": (1, 2), "prompt_tokens": (4, 300), "new_tokens": (3,), "repetitions": 2} | more
        return BenchmarkOptions(generate=True, model=model, device="cpu", output=output, **given)

    def test_a_cell_for_every_combination_and_none_is_measured_twice(
        self, tiny_base: Make, peft_adapter: Make, tmp_path: Path, here: list[GenerationTask]
    ) -> None:
        more = {"adapter": peft_adapter(tiny_base()), "dtype": ("same", "bfloat16")}
        options = self.options(tiny_base(), tmp_path / "out", **more)
        first = run_generation_benchmark(options)
        assert [(axis.key, axis.values) for axis in first.axes] == [
            ("adapter", ("off", "on")), ("dtype", ("float32", "bfloat16")), ("prompt_tokens", ("4", "300")),
            ("new_tokens", ("3",)), ("rows", ("1", "2")),
        ]  # fmt: skip
        statuses = ["measured", "measured", "refused", "refused"] * 4
        assert [result["status"] for result in first.results] == statuses
        assert "303 tokens of prompt and completion are more than the 256" in first.results[2]["reason"]
        assert [(each.rows, each.source.dtype, each.source.adapter is not None) for each in here] == [
            (rows, dtype, on) for on in (False, True) for dtype in ("float32", "bfloat16") for rows in (1, 2)
        ]
        assert run_generation_benchmark(options).payload() == first.payload()
        assert len(here) == 8
        run_generation_benchmark(self.options(tiny_base(), tmp_path / "out", repetitions=3, rows=(1,)))
        assert len(here) == 9, "another number of repetitions is another cell"

    def test_stopped_it_goes_on_where_it_was(self, tiny_base: Make, tmp_path: Path, here: list[GenerationTask]) -> None:
        options = self.options(tiny_base(), tmp_path / "out", prompt_tokens=(4,), rows=(1, 2, 3))
        with pytest.raises(Stopped, match="after 2 of 3 cells"):
            run_generation_benchmark(options, should_stop=lambda: len(here) == 2)
        run_generation_benchmark(options)
        assert [asked.rows for asked in here] == [1, 2, 3]

    def test_a_cell_that_failed_is_a_line_of_the_table(
        self, tiny_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outcomes = iter([{"status": "oom", "reason": "out of memory"}, {"status": "killed", "reason": "killed"}])
        monkeypatch.setattr(cell_runs, "run_cell", lambda *_: next(outcomes))
        run_generation_benchmark(self.options(tiny_base(), tmp_path / "out", prompt_tokens=(4,)))
        text = (tmp_path / "out" / "benchmark.md").read_text()
        assert "| float32 | 4 | 3 | 1 | OOM |" in text
        assert "| float32 | 4 | 3 | 2 | killed |" in text
        assert "- OOM: out of memory \\[" in text

    @pytest.mark.parametrize(
        ("given", "fault"), [({"model": Path("absent")}, CheckpointError), ({"model": None}, SpecError)]
    )
    def test_without_a_model_nothing_is_written(
        self, tmp_path: Path, given: dict[str, Any], fault: type[Exception]
    ) -> None:
        with pytest.raises(fault):
            run_generation_benchmark(BenchmarkOptions(generate=True, output=tmp_path / "out", **given))
        assert not (tmp_path / "out").exists()


def result(rows: int, **more: Any) -> dict[str, Any]:
    facts = {
        "prefill_tokens_per_second": 1234.4, "prefill_deviation": 5.25, "decode_tokens_per_second": 99.51,
        "decode_deviation": None, "first_token_s": 0.0125, "first_token_deviation_s": 0.0011,
        "bandwidth_bytes_per_second": 7.654e9, "bandwidth_fraction": 0.834, "step_read_bytes": 5 << 20,
        "weights_bytes": 4 << 20, "cache_bytes": 1 << 20, "allocated_bytes": 6 << 20, "reserved_bytes": None,
        "resident_bytes": 300 << 20, "held_in": "float32", "device": "cpu", "device_name": "cpu", "threads": 1,
        "torch": "2",
    }  # fmt: skip
    return {"values": {"dtype": "float32", "rows": str(rows)}, "status": "measured", **facts, **more}


AXES = [Axis("dtype", ("float32",)), Axis("rows", ("1", "4"))]


def test_the_table() -> None:
    table = generation_table(AXES, [result(1), result(4, bandwidth_fraction=1.25, decode_deviation=0.5)])
    assert table.header == (
        "dtype", "rows", "prefill tokens/s", "decode tokens/s", "first token (ms)", "bandwidth (GB/s)",
        "of the limit", "read a step", "weights", "keys and values", "peak", "resident",
    )  # fmt: skip
    one = ("float32", "1", "1,234 ± 5.25", "99.5", "12.5 ± 1.10", "7.65", "83%", "5.0", "4.0", "1.0", "6.0", "300.0")
    assert table.rows[0] == one
    assert table.rows[1][3] == "99.5 ± 0.50"
    assert any("caches" in note for note in table.notes)
    assert not any("caches" in note for note in generation_table(AXES, [result(1)]).notes)


def test_the_csv_has_plain_numbers() -> None:
    refused = {"values": {"dtype": "float32", "rows": "4"}, "status": "refused", "reason": "too long, far"}
    first, second = csv.DictReader(io.StringIO(generation_csv(AXES, [result(1), refused])))
    assert (first["rows"], first["decode_tokens_per_second"], first["decode_deviation"]) == ("1", "99.51", "")
    assert (second["status"], second["reason"], second["weights_bytes"]) == ("refused", "too long, far", "")


def test_the_verb_measures_a_cell_in_a_process_of_its_own(
    shared_fixtures: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    model = shared_fixtures / "stories260K-hf"
    words = ("benchmark", "--generate", "--model", model, "--rows", "2", "--prompt-tokens", "16", "--new-tokens", "8",
             "--repetitions", "2", "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip
    done = command(*words, "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [cell["status"] for cell in told["cells"]] == ["measured"]
    assert re.search(r"cell 1 of 1: dtype=float32, .*% of the bandwidth limit, peak", done.stderr)
    text = (tmp_path / "out" / "benchmark.md").read_text()
    for fact in ("machine", "cores", "torch", "device", "threads", "model", "repetitions"):
        assert re.search(rf"^- {fact}: .", text, re.MULTILINE), fact
    again = command(*words)
    assert "Speed of generation" in again.stdout
    assert f"the table is in {tmp_path / 'out'}" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "no run spec"),
        (["--rows", "1"], "--generate: --rows"),
        (["--generate"], "give its directory with --model"),
        (["run.yaml", "--generate", "--model", "m"], "SPEC.yaml is of training steps"),
        (["--generate", "--model", "m", "--steps", "3"], "--steps is of training steps"),
        (["--generate", "--model", "m", "--layout", "nested"], "--layout is of training steps"),
        (["--generate", "--model", "m", "--rows", "0"], "different numbers from 1"),
        (["--generate", "--model", "m", "--rows", "2,2"], "different numbers from 1"),
        (["--generate", "--model", "m", "--new-tokens", "1"], "different numbers from 2"),
        (["--generate", "--model", "m", "--dtype", "fp8"], "write different ones of same, float32"),
        (["--generate", "--model", "m", "--repetitions", "0"], "--repetitions"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, command: Callable[..., Any], arguments: list[str], part: str
) -> None:
    done = command("benchmark", "--output", tmp_path / "out", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_facts_name_every_value_that_cells_have() -> None:
    cells = [result(1), result(4, threads=2)]
    benchmark = GenerationBenchmark(tuple(AXES), cells, {"threads": [1, 2]})
    assert "- threads: 1, 2" in benchmark.markdown()


def test_prompts_are_the_same_in_every_process_and_differ() -> None:
    prompts = random_prompts(1000, 4, 50)
    assert prompts == random_prompts(1000, 4, 50)
    assert len({tuple(prompt) for prompt in prompts}) == 4
