"""The whole job on the tiny base and the instruction rows that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.data.prepare import prepare_data
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.generate import Generation, generate
from llamatune.inference.significance import Accuracy
from llamatune.options.inference import MergeOptions, ModelSource, Sampling
from llamatune.options.preparation import PrepareOptions
from llamatune.shapes.counts import count_parameters
from llamatune.spec import RunSpec, build_spec
from llamatune.strict_yaml import parse_yaml
from llamatune.training.run import train

MATERIAL = Path(str(resources.files("llamatune.demo")))
"""``base/``, the rows, and the run specs; wheels are installed unpacked, so these are plain files."""

_SAMPLING = Sampling(max_new_tokens=16, temperature=0)


@dataclass(frozen=True)
class HeldOut:
    """One held-out question: its right answer, and what the base, the tuned and the merged model said."""

    question: str
    expected: str
    base: str
    tuned: str
    merged: str


@dataclass(frozen=True)
class DemoReport:
    """Exact match is the percentage of held-out prompts whose whole answer is right."""

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
    """The LoRA run of the demo, writing below ``output``."""
    text = (MATERIAL / "finetune.yaml").read_text(encoding="utf-8")
    values = parse_yaml(text, MATERIAL / "finetune.yaml")
    values["model"]["path"] = str(MATERIAL / "base")
    values["data"]["train"] = str(output / "prepared")
    values["training"]["output_dir"] = str(output / "run")
    return build_spec(values, "finetune.yaml")


def held_out_rows() -> list[dict[str, str]]:
    """Questions about towns that no training row asks about."""
    return list(_rows(MATERIAL / "held_out.jsonl"))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def run_demo(output: Path, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> DemoReport:
    """prepare-data, count-params, train, generate --compare, merge-lora, generate; each as its verb does it.

    What an earlier call finished is left as it is, so that a stopped demo goes on where it was.
    """
    base, spec, held_out = MATERIAL / "base", demo_spec(output), held_out_rows()
    lora = spec.lora
    assert lora is not None

    def say(command: str) -> None:
        on_event(Notice(f"$ llamatune {command}"))

    say(f"prepare-data instructions.jsonl --tokenizer base/tokenizer.model --output {output}/prepared")
    prepare_data(
        PrepareOptions([MATERIAL / "instructions.jsonl"], base / "tokenizer.model", output / "prepared"),
        on_event,
        should_stop,
    )
    say(f"count-params --model base --r {lora.r} --target-modules {','.join(lora.target_modules)}")
    count = count_parameters(read_config(base), spec.adapter)
    on_event(Notice(count.familiar_line()))
    say("train finetune.yaml")
    summary = train(spec, on_event=on_event, should_stop=should_stop)
    adapter, merged = output / "run" / "adapter", output / "merged"
    say(f"generate --model base --adapter {adapter} --prompt-file held_out.jsonl --temperature 0 --compare")
    prompts = [row["instruction"] for row in held_out]
    both = ModelSource(base, adapter, compare=True, device="cpu")
    compared = generate(both, prompts, _SAMPLING, None, on_event, should_stop).results
    say(f"merge-lora --model base --adapter {adapter} --output {merged}")
    merge_lora(MergeOptions(base, adapter, merged), on_event, should_stop)
    say(f"generate --model {merged} --prompt-file held_out.jsonl --temperature 0")
    again = generate(ModelSource(merged, device="cpu"), prompts, _SAMPLING, None, on_event, should_stop).results
    return _report(output, summary, count.base_parameters, held_out, compared, again)


def _report(
    output: Path,
    summary: dict[str, Any],
    base_parameters: int,
    rows: list[dict[str, str]],
    compared: list[Generation],
    merged: list[Generation],
) -> DemoReport:
    held_out = [
        HeldOut(row["instruction"], row["output"], found.base_completion or "", found.completion, last.completion)
        for row, found, last in zip(rows, compared, merged, strict=True)
    ]

    def exact_match(kind: str) -> float:
        return 100 * Accuracy.of(getattr(row, kind) == row.expected for row in held_out).fraction

    return DemoReport(
        str(output),
        summary["trainable_parameters"],
        base_parameters,
        exact_match("base"),
        exact_match("tuned"),
        exact_match("merged"),
        summary["runtime_s"],
        summary["peak_memory_bytes"],
        held_out,
    )
