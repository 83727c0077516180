"""``run_demo``: prepares, trains, generates and merges with the tiny base and the rows in the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.inference import MergeOptions, ModelSource, Sampling
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.generate import generate
from llamatune.shapes.counts import count_parameters
from llamatune.spec import RunSpec, build_spec
from llamatune.strict_yaml import read_yaml
from llamatune.training.train import train

MATERIAL = Path(str(resources.files("llamatune.demo")))
"""The folder of ``base/``, the rows and the run specs; wheels are installed unpacked, so these are files."""

_SAMPLING = Sampling(max_new_tokens=16, temperature=0)


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
    """Results of the demo. Exact match: the percentage of held-out questions whose whole answer is right."""

    output: str
    trainable_parameters: int
    base_parameters: int
    base_exact_match: float
    tuned_exact_match: float
    merged_exact_match: float
    training_s: float
    peak_memory_bytes: int
    held_out: list[HeldOut]


def demo_spec(output: Path) -> RunSpec:
    """The spec of the demo's LoRA run, which writes below ``output``."""
    values = read_yaml(MATERIAL / "finetune.yaml")
    values["model"]["path"] = str(MATERIAL / "base")
    values["data"]["train"] = str(output / "prepared")
    values["training"]["output_dir"] = str(output / "run")
    return build_spec(values, "finetune.yaml")


def run_demo(output: Path, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> DemoReport:
    """prepare-data, count-params, train, generate --compare, merge-lora and generate, each as its verb does it.

    What an earlier call finished is kept, so that a stopped demo continues.
    """
    base, spec = MATERIAL / "base", demo_spec(output)
    held_out = [json.loads(line) for line in (MATERIAL / "held_out.jsonl").read_bytes().splitlines()]
    lora = spec.lora
    assert lora is not None

    def say(command: str) -> None:
        on_event(Notice(f"$ llamatune {command}"))

    say(f"prepare-data instructions.jsonl --tokenizer base/tokenizer.model --output {output}/prepared")
    rows, prepared = [MATERIAL / "instructions.jsonl"], output / "prepared"
    prepare_data(PrepareOptions(rows, base / "tokenizer.model", prepared), on_event, should_stop)
    say(f"count-params --model base --r {lora.r} --target-modules {','.join(lora.target_modules)}")
    count = count_parameters(read_config(base), spec.adapter)
    on_event(Notice(count.familiar_line()))
    say("train finetune.yaml")
    summary = train(spec, on_event=on_event, should_stop=should_stop)
    adapter, merged = output / "run" / "adapter", output / "merged"
    say(f"generate --model base --adapter {adapter} --prompt-file held_out.jsonl --temperature 0 --compare")
    prompts = [row["instruction"] for row in held_out]
    source = ModelSource(base, adapter, compare=True, device="cpu")
    compared = generate(source, prompts, _SAMPLING, None, on_event, should_stop).results
    say(f"merge-lora --model base --adapter {adapter} --output {merged}")
    merge_lora(MergeOptions(base, adapter, merged), on_event, should_stop)
    say(f"generate --model {merged} --prompt-file held_out.jsonl --temperature 0")
    of_merged = generate(ModelSource(merged, device="cpu"), prompts, _SAMPLING, None, on_event, should_stop).results
    answers = [
        HeldOut(row["instruction"], row["output"], both.base_completion or "", both.completion, last.completion)
        for row, both, last in zip(held_out, compared, of_merged, strict=True)
    ]
    base_match, tuned_match, merged_match = (
        100 * (sum(getattr(row, kind) == row.expected for row in answers) / len(answers))
        for kind in ("base", "tuned", "merged")
    )
    parameters = (summary["trainable_parameters"], count.base_parameters)
    costs = (summary["runtime_s"], summary["peak_memory_bytes"])
    return DemoReport(str(output), *parameters, base_match, tuned_match, merged_match, *costs, answers)
