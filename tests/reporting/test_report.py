"""Reports on real runs against what the runs, the data and the model say themselves; and on hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_material import falling, noisy, spec_values, write_run
from run_tools import progress_at

from llamatune.benchmarking.results import Work
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.command_options.training import ReportOptions
from llamatune.data.batches import Split
from llamatune.data.templates import Template
from llamatune.errors import NumericsError, Stopped
from llamatune.events import Answer, EvalDone
from llamatune.formats.state_json import write_progress
from llamatune.inference.generate import generate
from llamatune.inference.gsm8k import gsm8k_report
from llamatune.reporting.answer_timeline import answer_timelines
from llamatune.reporting.make_report import make_report
from llamatune.reporting.run_reader import read_run
from llamatune.reporting.spikes import Spike, with_rows
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.spec import RunSpec, build_spec
from llamatune.training.train import train

Make = Callable[..., RunSpec]


@pytest.fixture(scope="session")
def spec_of(tiny_base: Callable[..., Path], prepared: Callable[..., Path]) -> Make:
    """A spec of a run of 17 rows and 6 held out, 3 epochs of 3 windows, the last one partial."""

    def make(output: Path, **changes: Any) -> RunSpec:
        defaults = {
            "model__path": str(tiny_base()), "data__train": str(prepared(validation_fraction=0.25, seed=3)),
            "training__output_dir": str(output), "training__num_epochs": 3, "training__micro_batch_size": 4,
            "training__gradient_accumulation_steps": 2, "training__learning_rate": 0.01, "training__device": "cpu",
        }  # fmt: skip
        values = spec_values(**{**defaults, **changes})
        if values["lora"] is None:
            del values["lora"]
        return build_spec(values, "test")

    return make


@pytest.fixture(scope="session")
def finished(spec_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(spec_of(run, training__log_layer_grad_norms=True, lora__target_modules="all-linear"))
    return run


@pytest.fixture(scope="session")
def whole_model(spec_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    values = spec_of(run).model_dump(mode="json")
    del values["lora"]
    train(build_spec({**values, "training": {**values["training"], "learning_rate": 1e-3}}, "test"))
    return run


def report_on(*runs: Path, to: Path, **options: Any) -> dict[str, Any]:
    """The report as ``--json`` prints it."""
    return json.loads(json.dumps(asdict(make_report(ReportOptions(runs, to, **options))), allow_nan=False))


def test_figures_are_those_of_the_summary_the_base_and_the_data(finished: Path, tmp_path: Path) -> None:
    report = report_on(finished, to=tmp_path / "report.html")
    (run,) = report["runs"]
    summary, figures = json.loads((finished / "summary.json").read_text()), run["figures"]
    assert (run["name"], run["status"], run["notices"]) == ("finished", "finished", [])
    assert [epoch["train_loss"] for epoch in run["epochs"]] == pytest.approx(
        [epoch["train_loss"] for epoch in summary["epochs"]]
    )
    assert [epoch["target_tokens"] for epoch in run["epochs"]] == [e["target_tokens"] for e in summary["epochs"]]
    assert [(epoch["complete"], epoch["steps"]) for epoch in run["epochs"]] == [(True, 3)] * 3
    assert figures["train_loss"] == pytest.approx(summary["train_loss"])
    assert figures["best_validation_loss"] == summary["best_eval_loss"]
    assert figures["best_validation_step"] == summary["best_step"]
    for key in ("steps", "trainable_parameters", "total_parameters", "peak_memory_bytes", "runtime_s"):
        assert figures[key] == summary[key], key
    assert figures["tokens_per_second"] == summary["tokens_per_second"]
    assert run["memory"]["peak_memory_bytes"] == summary["peak_memory_bytes"]
    spec = build_spec(run["spec"], "report")
    assert spec.to_yaml() == (finished / "spec.yaml").read_text()
    config = read_config(Path(spec.model.path))
    count = count_parameters(config, AdapterSpec(16, 32, target_modules=LINEAR_MODULES))
    assert sum(facts["adapter"] for facts in run["parameters"].values()) == count.trainable_parameters
    assert sum(facts["base"] for facts in run["parameters"].values()) == count.base_parameters
    data = json.loads((Path(spec.data.train) / "llamatune.json").read_text())["facts"]
    assert {key: run["data"][key] for key in ("rows_in", "kept", "truncated", "dropped", "duplicates")} == {
        key: data[key] for key in ("rows_in", "kept", "truncated", "dropped", "duplicates")
    }
    assert (run["data"]["train_rows"], run["data"]["validation_rows"]) == (17, 6)
    assert run["versions"]["torch"] == torch.__version__
    assert [evaluation["step"] for evaluation in run["evaluations"]] == [0, 3, 6, 9]


def test_each_rank_has_its_row(tmp_path: Path) -> None:
    ranks = [
        {"peak_memory_bytes": 3 * 2**30, "tokens_per_second": 1234.4, "wait_share": 0.125},
        {"peak_memory_bytes": 2**29, "tokens_per_second": 987.0, "wait_share": 0.25},
    ]
    run = write_run(tmp_path / "run", falling(3), summary={"ranks": ranks})
    (report,) = report_on(run, to=tmp_path / "report.html")["runs"]
    assert report["ranks"] == ranks
    assert report["figures"]["ranks"] == 2
    text = _Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "03.00 GiB1,23412.5%1512.0 MiB98725.0%" in text


def test_energy_power_and_the_whole_gpus_memory_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    gpu = {"name": "NVIDIA H100", "capability": "9.0", "driver": "580.65.06", "cuda_driver": "13.0", "cuda": "12.8"}
    use = {"energy_j": 9_000_000.0, "mean_power_w": 512.4, "peak_power_w": 701.6, "peak_device_memory_bytes": 5 << 30}
    run = write_run(tmp_path / "gpu", falling(3), summary={"gpu": gpu, **use})
    (run / "checkpoints" / "step-000003").mkdir(parents=True)
    write_progress(run / "checkpoints" / "step-000003", progress_at(3, torch="2.13.0", gpu=gpu))
    cpu = write_run(tmp_path / "cpu", falling(3), summary={"gpu": None, **dict.fromkeys(use)})
    measured, none = report_on(run, cpu, to=tmp_path / "report.html")["runs"]
    assert {key: measured["figures"][key] for key in use} == use
    assert {key: none["figures"][key] for key in use} == dict.fromkeys(use)
    assert measured["versions"] == {"torch": "2.13.0", "GPU": "NVIDIA H100", "driver": "580.65.06", "CUDA": "12.8"}
    text = _Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "energy of the GPUs2.500 kWh-" in text
    assert "mean power, W512-" in text
    assert "highest of one GPU, W702-" in text
    assert "of the whole GPU, all processes5.00 GiB-" in text
    assert "trained with torch 2.13.0, GPU NVIDIA H100, driver 580.65.06, CUDA 12.8" in text
    report_on(cpu, to=tmp_path / "cpu.html")
    assert "energy of" not in _Reader((tmp_path / "cpu.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("cores", "threads", "shown"),
    [(8, 4, "CPU: EPYC 7B13, 8 cores, 4 threads"), (1, 1, "CPU: EPYC 7B13, 1 core, 1 thread")],
)
def test_the_processor_of_a_run_on_a_cpu_is_among_its_settings(
    cores: int, threads: int, shown: str, tmp_path: Path
) -> None:
    cpu = {"name": "EPYC 7B13", "cores": cores, "threads": threads}
    run = write_run(tmp_path / "cpu", falling(3), summary={"device": "cpu", "cpu": cpu})
    other = write_run(tmp_path / "gpu", falling(3), summary={"device": "cuda", "cpu": cpu, "gpu": {"name": "H100"}})
    early = write_run(tmp_path / "early", falling(3), summary={"device": "cpu"})
    runs = report_on(run, other, early, to=tmp_path / "report.html")["runs"]
    assert [found["settings"]["hardware"] for found in runs] == [shown, "H100", "CPU"]


def test_a_run_records_the_processor_that_the_system_names(finished: Path, tmp_path: Path) -> None:
    cpu = json.loads((finished / "summary.json").read_text())["cpu"]
    assert (cpu["cores"], cpu["threads"]) == (len(os.sched_getaffinity(0)), torch.get_num_threads())
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert not models or models[0].endswith(f": {cpu['name']}")
    (run,) = report_on(finished, to=tmp_path / "report.html")["runs"]
    assert run["settings"]["hardware"].startswith(f"CPU: {cpu['name']}, {cpu['cores']} core")


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report_on(finished, to=tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_answers_of_a_run_are_a_timeline_of_each_prompt(tmp_path: Path) -> None:
    """Hostile texts too, and of many answers some."""

    def line(step: int, number: int, answer: str) -> dict[str, Any]:
        told = {
            "prompt": f"<b>why {number}?</b>\n",
            "answer": answer,
            "reference": "<i>so</i>" if number == 1 else None,
        }
        return {"event": "answer", "step": step, "number": number, **told, "tokens": 3, "finish_reason": "length"}

    extra = {
        step: [line(step, number, f"<script>{step}\x1b[2J</script>") for number in (1, 2)] for step in range(1, 31)
    }
    run = write_run(tmp_path / "run", falling(30), extra=extra)
    report_on(run, to=tmp_path / "report.html", tables=tmp_path / "tables")
    (report,) = report_on(run, to=tmp_path / "again.html")["runs"]
    first, second = report["answers"]
    assert [first["prompt"], first["reference"], second["reference"]] == ["<b>why 1?</b>\n", "<i>so</i>", None]
    assert [first["answers"][place] for place in (0, -1)] == [
        [step, f"<script>{step}\\x1b[2J</script> ..."] for step in (1, 30)
    ]
    assert (len(first["answers"]), first["left_out"]) == (12, 18)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    text = _Reader(page).text
    assert "Answers while it trained" in text
    assert "step 30<script>30\\x1b[2J</script> ..." in text
    assert "12 of 30 answers; metrics.jsonl has all." in text
    markdown, tex = ((tmp_path / "tables" / f"answers-while-training.{kind}").read_text() for kind in ("md", "tex"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if "|" in line][2:]
    after = [f"step {step}" for found in (first, second) for step, _ in found["answers"]]
    assert [line[2] for line in lines] == ["reference", *after]
    assert [line[0] for line in lines] == ["1"] * 13 + ["2"] * 12
    assert "why 2?" in lines[-1][1]
    assert "30" in lines[-1][3]
    for table in (markdown, tex):
        assert "prompt 2: 12 of 30 answers; metrics.jsonl has all." in table
        assert "\x1b" not in table
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    report_on(write_run(tmp_path / "none", falling(3)), to=tmp_path / "none.html", tables=tmp_path / "no tables")
    assert not list((tmp_path / "no tables").glob("answers*"))
    assert "Answers while" not in (tmp_path / "none.html").read_text(encoding="utf-8")


def test_a_timeline_has_the_instruction_without_its_template() -> None:
    template = Template("ask", "Say: {instruction}\nNow:")
    answers = [Answer(0, n, prompt, "x", None, 1, "eos") for n, prompt in enumerate(("Say: why?\nNow:", "Why?"), 1)]
    assert [found.instruction for found in answer_timelines(answers, [template])] == ["why?", None]
    assert [found.instruction for found in answer_timelines(answers)] == [None, None]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_named_for_a_spike_are_those_that_were_trained_on(
    packing: bool, spec_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    batch = Split.batch

    def recording(self: Split, indices: Any) -> Any:
        found = batch(self, indices)
        if self is opened.train:
            trained.append(found.rows)
        return found

    spec = spec_of(
        tmp_path / "run", data__packing=packing, data__packed_tokens=60, evaluation__every_steps=100,
        training__micro_batch_size=2, training__gradient_accumulation_steps=1,
    )  # fmt: skip
    from llamatune.training import inputs

    opened = inputs.open_prepared(Path(spec.data.train))
    monkeypatch.setattr(inputs, "open_prepared", lambda path: opened)
    monkeypatch.setattr(Split, "batch", recording)
    train(spec)
    monkeypatch.undo()
    run = read_run(tmp_path / "run", "run")
    assert len(trained) == len(run.metrics.steps) > 9
    spikes = [Spike(s.step, s.step, s.step, s.window, 1, s.loss, 1.0, 1.0, 1.0, 1.0, True) for s in run.metrics.steps]
    named = with_rows(run, spikes)
    assert [tuple(spike.rows or ()) for spike in named] == [tuple(sorted(rows)) for rows in trained]


def test_rows_are_not_named_where_they_cannot_be_known(tmp_path: Path) -> None:
    losses = noisy(falling(60), 0.05)
    losses[50] *= 9
    run = write_run(tmp_path / "run", losses)
    (found,) = report_on(run, to=tmp_path / "report.html")["runs"]
    assert [spike["step"] for spike in found["diagnosis"]["spikes"]] == [51]
    assert found["diagnosis"]["spikes"][0]["rows"] is None
    assert any("prepared data is not there any more" in notice for notice in found["notices"])
    assert "the prepared data is needed to name them" in (tmp_path / "report.html").read_text()


def test_data_that_was_prepared_anew_is_not_taken_for_the_runs(finished: Path, tmp_path: Path) -> None:
    origin = finished / "origin.json"
    kept = origin.read_text()
    try:
        origin.write_text(json.dumps({**json.loads(kept), "train": "another digest"}))
        (found,) = report_on(finished, to=tmp_path / "report.html")["runs"]
    finally:
        origin.write_text(kept)
    assert found["data"] == {}
    assert any("other data than the run's" in notice for notice in found["notices"])


def _without_times(run: dict[str, Any]) -> dict[str, Any]:
    kept = {key: run[key] for key in ("evaluations", "diagnosis", "parameters", "data", "versions", "spec_changes")}
    return {**kept, "epochs": [{**epoch, "elapsed_s": None} for epoch in run["epochs"]]}


def test_a_run_resumed_again_and_again_is_reported_as_one_in_one_go(spec_of: Make, tmp_path: Path) -> None:
    train(spec_of(tmp_path / "whole"))
    states = []
    for count in (2, 1, 3, 99):
        left = iter(range(count))
        try:
            train(spec_of(tmp_path / "parts"), should_stop=lambda left=left: next(left, None) is None)
        except Stopped:
            (run,) = report_on(tmp_path / "parts", to=tmp_path / f"{count}.html")["runs"]
            states.append((run["status"], run["figures"]["steps"], run["figures"]["tokens_per_second"]))
    assert [status for status, _, _ in states] == ["unfinished"] * 3
    assert [speed for _, _, speed in states] == [None] * 3
    whole, parts = report_on(tmp_path / "whole", tmp_path / "parts", to=tmp_path / "both.html")["runs"]
    assert _without_times(whole) == _without_times(parts)


def test_a_run_that_broke_off_at_nan_is_reported(spec_of: Make, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "run", training__learning_rate=1e30, training__max_grad_norm=None)
    with pytest.raises(NumericsError):
        train(spec)
    (run,) = report_on(tmp_path / "run", to=tmp_path / "report.html")["runs"]
    assert run["status"] == "unfinished"
    assert run["figures"]["steps"] >= 1
    assert run["figures"]["trainable_parameters"] > 0
    assert run["memory"]["peak_memory_bytes"] > 0


def test_answers_before_and_after_are_those_of_generate(
    finished: Path, whole_model: Path, tmp_path: Path, tiny_base: Callable[..., Path]
) -> None:
    prompts, greedy = ["a red llama", "nine <i>blue</i> apples"], Sampling(5, temperature=0)
    report = report_on(finished, whole_model, to=tmp_path / "r.html", prompt=prompts, max_new_tokens=5)
    lora, full = report["samples"]
    expected = generate(ModelSource(tiny_base(), finished / "adapter", compare=True), prompts, greedy).results
    assert lora["source"] == "finished"
    assert [(s["prompt"], s["base"], s["tuned"]) for s in lora["samples"]] == [
        (found.prompt, found.base_completion, found.completion) for found in expected
    ]
    tuned = generate(ModelSource(whole_model / "model"), prompts, greedy).results
    base = generate(ModelSource(tiny_base()), prompts, greedy, template="none").results
    assert [sample["tuned"] for sample in full["samples"]] == [found.completion for found in tuned]
    assert [sample["prompt"] for sample in full["samples"]] == [found.prompt for found in tuned]
    assert len(base) == len(full["samples"])
    assert "nine &lt;i&gt;blue&lt;/i&gt; apples" in (tmp_path / "r.html").read_text()


def test_a_run_of_every_parameter_has_no_adapter(whole_model: Path, tmp_path: Path) -> None:
    (run,) = report_on(whole_model, to=tmp_path / "report.html")["runs"]
    assert not any(facts["adapter"] for facts in run["parameters"].values())
    assert run["figures"]["trainable_percent"] == 100


def test_answers_come_from_what_generate_wrote(
    finished: Path, tmp_path: Path, tiny_base: Callable[..., Path], command: Callable[..., Any]
) -> None:
    answers = tmp_path / "answers.jsonl"
    done = command(
        "generate", "--model", tiny_base(), "--adapter", finished / "adapter", "--prompt", "a llama", "--compare",
        "--temperature", 0, "--max-new-tokens", 4, "--output", answers, "--json",
    )  # fmt: skip
    (expected,) = json.loads(done.stdout)["results"]
    (samples,) = report_on(finished, to=tmp_path / "report.html", generations=answers)["samples"]
    (sample,) = samples["samples"]
    found = {key: sample[key] for key in ("prompt", "base", "tuned", "instruction", "split", "row", "reference")}
    assert (samples["source"], found) == ("answers.jsonl", {
        "prompt": expected["prompt"], "base": expected["base_completion"], "tuned": expected["completion"],
        "instruction": "a llama", "split": None, "row": None, "reference": None,
    })  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"prompt": 1, "completion": "x"}', '{"prompt": "x"}', "null"])
def test_generations_of_another_kind_are_refused(
    text: str, finished: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "g.jsonl").write_text(text + "\n")
    done = command("report", finished, "--output", tmp_path / "r.html", "--generations", tmp_path / "g.jsonl")
    assert (done.code, done.stdout) == (3, "")
    assert "g.jsonl:1" in done.stderr
    assert not (tmp_path / "r.html").exists()


def test_several_runs_are_compared_by_what_differs(finished: Path, whole_model: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", falling(30), [EvalDone(10, 2.0)], training__seed=7)
    report = report_on(finished, whole_model, other, to=tmp_path / "report.html")
    differences = report["spec_differences"]
    assert differences["training.seed"] == {"finished": 0, "whole": 0, "other": 7}
    assert differences["lora.r"] == {"finished": 16, "whole": None, "other": 16}
    assert "training.output_dir" not in differences
    assert "training.weight_decay" not in differences


class _Reader(HTMLParser):
    """All elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "</td></pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$x\x1b[31m\u202e"


def hostile_runs(folder: Path) -> list[Path]:
    """Two runs and a file of generations with markup wherever text can stand."""
    values = {"model__path": HOSTILE.replace("/", "|"), "data__train": "<svg onload=alert(3)>\x1b"}
    norms = [{"event": "layer_grad_norms", "step": 1, "norms": {"</text><script>": 1.0, "$\\frac": 2.0}}]
    one = write_run(folder / "<script>alert(4)<|script>", falling(30), extra={1: norms}, **values)
    two = write_run(
        folder / "'\" onmouseover='alert(5)'",
        falling(3),
        summary={"device": HOSTILE, "predicted_memory_bytes": {"<b>": 5}, "runtime_s": 9e99},
    )
    (one / "trace-<script>.json").write_text("{}")
    change = {"field": HOSTILE, "old": HOSTILE, "new": ["<b>"]}
    origin = {"base": HOSTILE, "train": [HOSTILE], "validation": None, "spec_changes": [change]}
    (one / "origin.json").write_text(json.dumps(origin))
    (one / "checkpoints" / "step-000003").mkdir(parents=True)
    write_progress(one / "checkpoints" / "step-000003", progress_at(3, torch=HOSTILE, gpu={"name": HOSTILE}))
    (folder / "generations.jsonl").write_text(
        json.dumps({"prompt": HOSTILE, "completion": HOSTILE, "base_completion": None}) + "\n"
    )
    return [one, two]


def test_whatever_files_say_is_shown_as_text(tmp_path: Path) -> None:
    one, two = hostile_runs(tmp_path)
    report_on(one, two, to=tmp_path / "report.html", generations=tmp_path / "generations.jsonl")
    page = _Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "a", "base", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "style") and value:
                assert name == "style" or value.startswith(("#", "data:image/png;base64,"))
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert(4)<|script>" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


STATES: dict[str, Callable[[Path], Path]] = {
    "no step yet": lambda path: write_run(path, []),
    "the loss before training alone": lambda path: write_run(
        path, [], tail='{"event": "eval", "step": 0, "loss": 2.5}\n'
    ),
    "a single step": lambda path: write_run(path, [2.5], training__max_steps=1),
    "one step and its evaluation": lambda path: write_run(path, [2.5], [EvalDone(1, 2.0)]),
    "fp16 with skipped windows": lambda path: write_run(
        path, falling(12), extra={3: [{"event": "skipped", "window": 4, "loss_scale": 0.5}]},
        training__precision="fp16",
    ),
    "losses of zero": lambda path: write_run(path, [0.0] * 40, [EvalDone(20, 0.0), EvalDone(40, 0.0)]),
    "a flat gradient": lambda path: write_run(path, [1e-300] * 40),
    "losses beyond measure": lambda path: write_run(path, [9e98, 1.0, 9e98] * 20, [EvalDone(3, 1e99)]),
    "a torn end": lambda path: write_run(path, falling(30), tail='{"event": "step", "st'),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_is_reported(state: str, tmp_path: Path, command: Callable[..., Any]) -> None:
    run = STATES[state](tmp_path / "run")
    done = command("report", run, "--output", tmp_path / "r.html", "--json")
    assert done.code == 0, done.stderr
    payload = json.loads(done.stdout)
    assert (done.stdout.count("\n"), payload["output"]) == (1, str(tmp_path / "r.html"))
    assert len(payload["runs"][0]["diagnosis"]) == 6
    assert ("<figure" in (tmp_path / "r.html").read_text()) == (state != "no step yet")


def test_pictures_of_runs_without_a_chart_are_told_of(tmp_path: Path, command: Callable[..., Any]) -> None:
    for state, warned in (("no step yet", True), ("a single step", False)):
        run, made = STATES[state](tmp_path / state / "run"), tmp_path / state
        images = ("--png", made / "r.png", "--charts", made / "charts")
        done = command("report", run, "--output", made / "r.html", *images)
        assert done.code == 0
        told = [line for line in done.stderr.splitlines() if "no chart in it, since no run has logged a step" in line]
        assert [Path(line.split(": ")[1].split(" ", 1)[1]) for line in told] == [images[1], images[3]] * warned
        assert any((made / "charts").iterdir()) == (not warned)


def test_people_read_the_figures_and_the_findings(finished: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    done = command("report", finished, "--output", tmp_path / "r.html")
    assert done.code == 0
    for part in ("lowest validation loss", "trained parameters", "No spikes of the training loss", "written to"):
        assert part in done.stdout
    page = (tmp_path / "r.html").read_text()
    for part in ("Final figures", "Diagnosis", "Curves", "Epochs", "Parameters and memory", "The resolved spec"):
        assert part in page
    assert "Before and after" not in page
    assert "Differences between the specs" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["absent"], 4, "no such directory: absent"),
        (["empty"], 4, "not a run directory: empty"),
        (["run", "./run"], 2, "given twice"),
        (["run", "--smoothing", "1"], 2, "--smoothing is 1.0"),
        (["run", "--png", "report.html"], 2, "the same file"),
        (["run", "--prompt", "x", "--prompt-file", "y"], 2, "exclude each other"),
        (["run", "--prompt", "x"], 4, "no trained weights yet"),
        (["run", "--generations", "absent"], 3, "no such file: absent"),
        (["run", "--png", "there.png"], 5, "exists: there.png: choose another output, or pass --overwrite"),
        (["run", "--png", "absent/x.png"], 5, "no such directory"),
        ([], 2, "Missing argument 'RUN...'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, part: str, tmp_path: Path, command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_run(tmp_path / "run", falling(5))
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.png").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = command("report", *arguments, "--output", "report.html", "--json")
    assert (done.code, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert part in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_existing_page_is_kept_unless_it_may_be_replaced(tmp_path: Path, command: Callable[..., Any]) -> None:
    run, page = write_run(tmp_path / "run", falling(5)), tmp_path / "report.html"
    page.write_text("mine")
    done = command("report", run, "--output", page)
    assert (done.code, page.read_text()) == (5, "mine")
    assert "--overwrite" in done.stderr
    assert command("report", run, "--output", page, "--overwrite").code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_without_matplotlib_there_is_a_line_that_says_what_to_install(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", falling(5))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command("report", run, "--output", tmp_path / "report.html")
    assert done.code == 5
    assert done.stderr == "error: the charts need matplotlib: pip install matplotlib\n"


def test_a_signal_while_generating_leaves_no_page(finished: Path, tmp_path: Path) -> None:
    asked: Iterator[int] = iter(range(3))
    with pytest.raises(Stopped):
        make_report(
            ReportOptions([finished], tmp_path / "r.html", prompt=["a"], max_new_tokens=50),
            should_stop=lambda: next(asked, None) is None,
        )
    assert not list(tmp_path.iterdir())


def test_a_report_without_prompts_loads_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(30))
    code = (
        "import sys\nfrom llamatune.cli import main\n"
        f"try: main(['report', {str(run)!r}, '--output', {str(tmp_path / 'r.html')!r}])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def _drawn(base: Path, finished: Path, data: Path, command: Callable[..., Any]) -> list[dict[str, Any]]:
    done = command(
        "generate", "--model", base, "--adapter", finished / "adapter", "--from-data", data, "--compare", "--rows",
        "train:3,validation:3", "--temperature", 0, "--max-new-tokens", 5, "--seed", 7, "--json",
    )  # fmt: skip
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results


def test_rows_inside_and_outside_the_training_set_are_answered_without_their_template(
    finished: Path, tmp_path: Path, tiny_base: Callable[..., Path], prepared: Callable[..., Path],
    command: Callable[..., Any],
) -> None:  # fmt: skip
    """As ``generate --from-data`` answers them; the instruction is what stands in the rows."""
    data = prepared(validation_fraction=0.25, seed=3)
    report = report_on(finished, to=tmp_path / "r.html", rows=3, seed=7, max_new_tokens=5, tables=tmp_path / "tables")
    (answers,) = report["samples"]
    expected = _drawn(tiny_base(), finished, data, command)
    assert [
        (s["prompt"], s["base"], s["tuned"], s["split"], s["row"], s["reference"]) for s in answers["samples"]
    ] == [
        (e["prompt"], e["base_completion"], e["completion"], e["split"], e["row"], e["reference"]) for e in expected
    ]  # fmt: skip
    assert [sample["split"] for sample in answers["samples"]] == ["train"] * 3 + ["validation"] * 3
    page = _Reader((tmp_path / "r.html").read_text(encoding="utf-8")).text
    inside, outside = page.index("Inside the training set"), page.index("Outside the training set")
    for place, sample in enumerate(answers["samples"]):
        instruction = sample["instruction"]
        assert "###" not in instruction
        assert instruction in sample["prompt"]
        assert (page.index(f"Row {sample['row']}") > outside) == (place > 2)
        assert sample["reference"].strip() in (tmp_path / "tables" / "answers-1.md").read_text()
    assert inside < outside


def test_rows_of_a_run_whose_model_is_not_at_hand_are_a_notice(tmp_path: Path, command: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "run", falling(12))
    (found,) = report_on(run, to=tmp_path / "r.html", rows=2)["runs"]
    assert any("no answers of rows: its base is not there" in notice for notice in found["notices"])
    assert "Before and after" not in (tmp_path / "r.html").read_text()


def test_what_evaluate_printed_is_on_the_page(
    finished: Path, tmp_path: Path, tiny_base: Callable[..., Path], prepared: Callable[..., Path],
    command: Callable[..., Any],
) -> None:  # fmt: skip
    data = prepared(validation_fraction=0.25, seed=3)
    done = command("evaluate", "--model", tiny_base(), "--adapter", finished / "adapter", "--data", data, "--compare",
                   "--json")  # fmt: skip
    (tmp_path / "loss.json").write_text(done.stdout)
    lines = [{"correct": n < 3, "answer": "1", "finish_reason": "stop", "base_correct": n < 1, "base_answer": None,
              "base_finish_reason": "length"} for n in range(4)]  # fmt: skip
    (tmp_path / "gsm8k.json").write_text(json.dumps(gsm8k_report("<b>test</b>.jsonl", "float32", 0, lines)))
    paths = [tmp_path / "loss.json", tmp_path / "gsm8k.json"]
    of_loss, of_answers = report_on(finished, to=tmp_path / "r.html", evaluation=paths)["evidence"]
    printed = json.loads(done.stdout)
    assert of_loss["header"] == ["", "base", "tuned"]
    assert of_loss["rows"][0] == ["loss, nats a token", f"{printed['base_loss']:.4f}", f"{printed['loss']:.4f}"]
    assert ["accuracy", "25.0%", "75.0%"] in of_answers["rows"]
    assert "Tuning gained 2 answers and lost 0" in of_answers["notes"][0]
    assert "GSM8K: 4 questions of <b>test</b>.jsonl" in _Reader((tmp_path / "r.html").read_text()).text


@pytest.mark.parametrize(
    ("option", "text", "code", "part"),
    [
        ("--evaluation", "[]", 3, "not a JSON object"),
        ("--evaluation", '{"loss": 1}', 3, "has no "),
        ("--evaluation", '{"task": "gsm8k", "data": 1}', 3, "it should be a valid string"),
        ("--benchmark", '{"axes": [], "cells": [{}]}', 4, "has no values"),
        ("--benchmark", '{"axes": [{"key": "batch", "values": ["a"]}], "cells": []}', 4, "do not fit each other"),
        ("--benchmark", "{", 4, "not valid JSON"),
    ],
)
def test_evidence_of_another_kind_is_refused(
    option: str, text: str, code: int, part: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    place = tmp_path / "given"
    place.mkdir()
    (place / "benchmark.json").write_text(text)
    given = place / "benchmark.json" if option == "--evaluation" else place
    run = write_run(tmp_path / "run", falling(5))
    done = command("report", run, "--output", tmp_path / "r.html", option, given)
    assert (done.code, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert part in done.stderr
    assert "benchmark.json" in done.stderr or "do not fit" in done.stderr
    assert not (tmp_path / "r.html").exists()


def benchmark_cell(lora: str, peak: int) -> dict[str, Any]:
    categories = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "casts", "temporary"), peak // 6)
    return {
        "values": {"lora": lora}, "status": "measured", "allocated_bytes": peak, "predicted_bytes": peak,
        "reserved_bytes": None, "device_bytes": None, "resident_bytes": None, "categories": categories,
        "unattributed_bytes": 0, "losses": [1.0], "held_out_losses": [], "step_s": 0.5, "step_s_range": [0.4, 0.6],
        "runtime_s": 10.0, "tokens_per_second": 100.0, "steps": 20, "warm_up_steps": 2, "skipped_windows": 0,
        "tokens": 1000, "trainable_parameters": 5, "total_parameters": 50, "device": "cpu", "device_name": "<b>cpu",
        "threads": 1, "torch": "2", **Work(200, 1.5, 25_400).facts(100.0),
    }  # fmt: skip


def test_what_is_the_same_for_several_runs_stands_once(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    report_on(finished, tmp_path / "copy", to=tmp_path / "r.html", tables=tmp_path / "t")
    text = _Reader((tmp_path / "r.html").read_text()).text
    assert text.count("parameters, all blocks together") == text.count("longest row tokens") / 2 == 1
    assert "finished, copy: parameters, all blocks together" in text
    assert text.count("finished: epochs") == text.count("copy: epochs") == 1
    assert {"parameters-1.md", "parameters-2.md"} <= {path.name for path in (tmp_path / "t").iterdir()}
    # The number of trained parameters stands among the settings, and among the parameters by module.
    assert text.count("trained parameters") == 1


def test_what_many_runs_share_stands_once_on_their_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed {n}", falling(3), training__learning_rate=1e-3 * n) for n in range(1, 5)]
    report_on(*runs, to=tmp_path / "r.html")
    text = _Reader((tmp_path / "r.html").read_text()).text
    assert "Training report: 4 runs" in text
    shared, differ = text[text.index("Settings of all runs") :].split("Settings that differ")
    assert "modelnone" in shared
    assert "learning rate0.001, constant0.002, constant0.003, constant0.004, constant" in differ
    assert text.count("the prepared data is not there any more") == 1
    assert "all runs: the prepared data is not there any more" in text
    report_on(*runs[:3], to=tmp_path / "three.html")
    text = _Reader((tmp_path / "three.html").read_text()).text
    assert "Training report: seed 1, seed 2, seed 3" in text
    assert "modelnonenonenone" in text
    assert "seed 1, seed 2, seed 3: the prepared data is not there any more" in text


def test_tables_of_several_benchmarks_are_told_apart(tmp_path: Path) -> None:
    for name, lora in (("one", "off"), ("two", "on")):
        (tmp_path / name).mkdir()
        written = {
            "axes": [{"key": "lora", "values": [lora]}],
            "cells": [benchmark_cell(lora, 600 << 20)],
            "effects": [],
        }
        (tmp_path / name / "benchmark.json").write_text(json.dumps({**written, "steps": 20}))
    run = write_run(tmp_path / "run", falling(5))
    given = [tmp_path / "one", tmp_path / "two"]
    titles = [made["title"] for made in report_on(run, to=tmp_path / "r.html", benchmark=given)["evidence"]]
    assert len(titles) == len(set(titles))
    assert {title.partition(": ")[0] for title in titles} == set(map(str, given))


def test_the_tables_of_a_benchmark_are_on_the_page(tmp_path: Path) -> None:
    cells = [
        benchmark_cell("off", 600 << 20),
        {"values": {"lora": "on"}, "status": "oom", "reason": "needs <i>40</i> GiB"},
    ]
    written = {"axes": [{"key": "lora", "values": ["off", "on"]}], "cells": cells, "steps": 20, "effects": []}
    (tmp_path / "benchmark.json").write_text(json.dumps(written))
    run = write_run(tmp_path / "run", falling(5))
    tables = report_on(run, to=tmp_path / "r.html", benchmark=[tmp_path], tables=tmp_path / "t")["evidence"]
    assert tables[0]["rows"][0][:2] == ["off", "600.0"]
    assert tables[0]["rows"][1][:2] == ["on", "OOM"]
    assert tables[1]["rows"][0][:2] == ["off", "254.0"]
    assert any("200 rows x 1.5 epochs" in note for note in tables[1]["notes"])
    notes = [note for made in tables for note in made["notes"]]
    assert len(notes) == len(set(notes)) > 3
    assert "needs <i>40</i> GiB" in _Reader((tmp_path / "r.html").read_text()).text
    assert (tmp_path / "t" / "benchmark-1-1.tex").is_file()


def test_a_report_from_elsewhere_finds_what_the_run_was_started_on(
    spec_of: Make, tiny_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    spec = spec_of(Path("runs/one"), training__num_epochs=None, training__max_steps=1)
    (tmp_path / "project" / "rows").symlink_to(spec.data.train)
    (tmp_path / "project" / "base").symlink_to(tiny_base())
    values = spec.model_dump(mode="json")
    values["data"]["train"], values["model"]["path"] = "rows", "base"
    monkeypatch.chdir(tmp_path / "project")
    train(build_spec(values, "test"))
    monkeypatch.chdir(tmp_path)
    (run,) = report_on(Path("project/runs/one"), to=tmp_path / "r.html")["runs"]
    assert (run["notices"], run["data"]["train_rows"]) == ([], 17)
    assert run["parameters"]
    assert run["spec"]["data"]["train"] == "rows"


def test_charts_and_tables_are_files_that_replace_their_like_alone(tmp_path: Path, command: Callable[..., Any]) -> None:
    run = write_run(tmp_path / "run", falling(30))
    charts, tables = tmp_path / "charts", tmp_path / "tables"
    words = ("report", run, "--output", tmp_path / "r.html", "--charts", charts, "--tables", tables, "--overwrite")
    assert command(*words).code == 0
    made = {path.name for path in charts.iterdir()}
    assert {f"loss.{kind}" for kind in ("png", "svg", "pdf")} <= made
    assert {"settings.md", "settings.tex", "epochs.md"} <= {path.name for path in tables.iterdir()}
    (charts / "old.png").write_text("an earlier one")
    assert command(*words).code == 0
    assert {path.name for path in charts.iterdir()} == made
    (charts / "notes.txt").write_text("mine")
    done = command(*words)
    assert (done.code, "the directory holds something else: notes.txt" in done.stderr) == (5, True)
    assert (charts / "notes.txt").read_text() == "mine"


def test_hostile_texts_stay_texts_in_every_table(tmp_path: Path) -> None:
    one, two = hostile_runs(tmp_path)
    given = {"generations": tmp_path / "generations.jsonl", "charts": tmp_path / "c", "tables": tmp_path / "t"}
    report_on(one, two, to=tmp_path / "report.html", **given)
    for path in (tmp_path / "t").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "<script>" not in text.replace("\\<script\\>", "")
    for path in (tmp_path / "c").glob("*.svg"):
        assert "<script" not in path.read_text()
