"""``run_demo``: the whole job on the tiny base and the rows in the package, each step as its verb does it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.command_line import command_line
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.command_options.inspection import CountOptions
from llamatune.command_options.option import Options
from llamatune.command_options.preparation import PrepareOptions
from llamatune.command_options.training import ReportOptions, TrainOptions
from llamatune.data.prepare import prepare_data
from llamatune.durable_writing import write_atomic
from llamatune.errors import EnvironmentFault
from llamatune.events import Command, Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.generate import generate
from llamatune.inference.prompt_files import given_prompts
from llamatune.reporting.make_report import make_report
from llamatune.shapes.counts import count_parameters
from llamatune.spec import RunSpec, load_spec
from llamatune.training.train import train

MATERIAL = Path(str(resources.files("llamatune.demo")))
"""The folder of ``base/``, the rows and the run specs; wheels are installed unpacked, so these are files."""


@dataclass(frozen=True)
class HeldOut:
    """One held-out question, the right answer, and the answers of the base, the tuned and the merged model."""

    question: str
    expected: str
    base: str
    tuned: str
    merged: str


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo, the commands that do the same, and the page about its run.

    Exact match: the percentage of held-out questions whose whole answer is right; contains: whose answer holds the
    right one as words.
    """

    output: str
    trainable_parameters: int
    base_parameters: int
    base_exact_match: float
    tuned_exact_match: float
    merged_exact_match: float
    base_contains: float
    tuned_contains: float
    merged_contains: float
    training_s: float
    peak_memory_bytes: int
    report: str
    commands: list[str]
    held_out: list[HeldOut]


def write_demo_spec(output: Path) -> Path:
    """``run.yaml`` of the demo's LoRA run, which reads and writes below ``output``.

    Raises:
        EnvironmentFault: another file of that name is there.
    """
    paths = {"path": MATERIAL / "base", "train": output / "prepared", "output_dir": output / "run"}
    text = (MATERIAL / "finetune.yaml").read_text(encoding="utf-8")
    for key, path in paths.items():
        line = f"  {key}: {json.dumps(str(path))}"
        text = re.sub(rf"^  {key}: .*$", lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
    spec = output / "run.yaml"
    output.mkdir(parents=True, exist_ok=True)
    if spec.exists() and spec.read_bytes() != text.encode():
        raise EnvironmentFault("it is not what the demo wrote", spec, "give another --output, or remove it")
    if not spec.exists():
        write_atomic(spec, text.encode(), overwrite=False)
    return spec


def demo_spec(output: Path) -> RunSpec:
    """What ``write_demo_spec`` wrote, read."""
    return load_spec(write_demo_spec(output))


def run_demo(output: Path, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> DemoReport:
    """prepare-data, count-params, train, generate --compare, merge-lora, generate and report, each as its verb does it.

    What an earlier call finished is kept, so that a stopped demo continues.
    """
    base, prepared, run = MATERIAL / "base", output / "prepared", output / "run"
    adapter, merged, page = run / "adapter", output / "merged", output / "report.html"
    commands: list[str] = []

    def begin(verb: str, options: Options) -> None:
        commands.append(command_line(verb, options))
        on_event(Command(commands[-1]))

    preparing = PrepareOptions([MATERIAL / "instructions.jsonl"], tokenizer=base / "tokenizer.model", output=prepared)
    begin("prepare-data", preparing)
    prepare_data(preparing, on_event, should_stop)

    spec_path = write_demo_spec(output)
    spec = load_spec(spec_path)
    lora = spec.lora
    assert lora is not None
    begin("count-params", CountOptions(model=base, r=lora.r, target_modules=",".join(lora.target_modules)))
    count = count_parameters(read_config(base), spec.adapter)
    on_event(Notice(count.familiar_line()))

    begin("train", TrainOptions(spec_path))
    summary = train(spec, on_event=on_event, should_stop=should_stop)

    def answers(model: Path, *adapters: Path) -> list[dict[str, str]]:
        options = GenerateOptions(
            model=model, adapter=adapters or None, compare=bool(adapters), device="cpu", temperature=0,
            max_new_tokens=16, prompt_file=MATERIAL / "held_out.jsonl",
        )  # fmt: skip
        begin("generate", options)
        prompts = given_prompts(options, on_event, should_stop)
        return generate(options, prompts, options, options.template, on_event, should_stop, lookup=options.lookup).lines

    compared = answers(base, adapter)
    merging = MergeOptions(base, adapter, merged)
    begin("merge-lora", merging)
    merge_lora(merging, on_event, should_stop)
    of_merged = answers(merged)
    reporting = ReportOptions([run], page, overwrite=True)
    begin("report", reporting)
    make_report(reporting, on_event, should_stop)

    questions = [json.loads(line) for line in (MATERIAL / "held_out.jsonl").read_bytes().splitlines()]
    held_out = [
        HeldOut(row["instruction"], row["output"], both["base_completion"], both["completion"], last["completion"])
        for row, both, last in zip(questions, compared, of_merged, strict=True)
    ]
    parameters = (summary["trainable_parameters"], count.base_parameters)
    exact, contained = _percentages(held_out, _is_exact), _percentages(held_out, _contains)
    costs = (summary["runtime_s"], summary["peak_memory_bytes"])
    return DemoReport(str(output), *parameters, *exact, *contained, *costs, str(page), commands, held_out)


def _percentages(rows: list[HeldOut], judge: Callable[[str, str], bool]) -> tuple[float, float, float]:
    """Of base, tuned and merged model, the percentage of questions whose answer ``judge`` accepts."""
    judged = [[judge(answer, row.expected) for answer in (row.base, row.tuned, row.merged)] for row in rows]
    base, tuned, merged = (100 * sum(model) / len(rows) for model in zip(*judged, strict=True))
    return base, tuned, merged


def _is_exact(answer: str, expected: str) -> bool:
    return answer == expected


def _contains(answer: str, expected: str) -> bool:
    return re.search(rf"\b{re.escape(expected)}\b", answer) is not None
