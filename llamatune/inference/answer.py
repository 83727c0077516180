"""From prompts as a user writes them to completions as text, before and after tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from llamatune.data.prompts import Template
from llamatune.devices import memory_faults
from llamatune.errors import DataError
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.files import parse_json, read_bytes
from llamatune.inference.generate import Completion, complete
from llamatune.inference.opened import open_model
from llamatune.inference.sampling import Sampling
from llamatune.threads import suitable_threads

_BATCH = 16
_LARGEST_PROMPT_FILE = 256 << 20

Prompt = str | Mapping[str, str]
"""A user's message, or a row's fields by name."""


@dataclass(frozen=True)
class Request:
    """Which model answers what, and how. ``template`` None is the one stored with the adapter or merged model."""

    model: Path
    prompts: Sequence[Prompt]
    sampling: Sampling
    adapter: Path | None = None
    template: str | None = None
    compare: bool = False
    force_base: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class Answer:
    """One prompt as the model saw it, and what came after it; ``base_completion`` is the untuned model's."""

    prompt: str
    completion: str
    completion_ids: list[int]
    finish_reason: str
    base_completion: str | None = None


@dataclass(frozen=True)
class Answers:
    """All answers, in the order of the prompts, and the speed of the (tuned) model that gave them."""

    results: list[Answer]
    tokens_per_second: float


def answer(request: Request, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> Answers:
    """Load, generate, decode.

    Raises:
        SpecError: nothing to compare with, or a template that has no place for a prompt.
        CheckpointError: model, tokenizer or adapter cannot be used or do not belong together.
    """
    opened = open_model(
        request.model, request.adapter, request.compare, request.force_base, request.dtype, request.device, on_event
    )
    tokenizer, template = opened.tokenizer(), opened.template(request.template)
    texts = [_prompt_text(prompt, template, number) for number, prompt in enumerate(request.prompts, 1)]
    ids = [tokenizer.encode(text) for text in texts]
    beams, config = request.sampling.num_beams, opened.checkpoint.config
    threads = suitable_threads(config, beams if beams > 1 else min(_BATCH, len(ids)))
    with memory_faults(opened.device, "use a 16-bit --dtype, or fewer --max-new-tokens"), threads:
        models = opened.load(on_event, should_stop)
        eos_ids = {*config.eos_token_ids, tokenizer.eos_id}

        def run(name: str, task: str) -> tuple[list[Completion], float]:
            started, done = monotonic(), []
            for first in range(0, len(ids), _BATCH):
                done += complete(models[name], ids[first : first + _BATCH], request.sampling, eos_ids, should_stop)
                on_event(Progress(task, len(done), len(ids)))
            return done, sum(len(found.ids) for found in done) / max(monotonic() - started, 1e-9)

        before = run("base_", "generating with the base")[0] if request.compare else None
        completions, speed = run("", "generating")
    results = [
        Answer(
            text,
            tokenizer.continuation(prompt, found.ids),
            found.ids,
            found.finish_reason,
            None if before is None else tokenizer.continuation(prompt, before[index].ids),
        )
        for index, (text, prompt, found) in enumerate(zip(texts, ids, completions, strict=True))
    ]
    return Answers(results, speed)


def _prompt_text(prompt: Prompt, template: Template | None, number: int) -> str:
    if isinstance(prompt, str):
        return prompt if template is None else template.instruction_prompt(prompt)
    if template is not None:
        optional: dict[str, str] = {name: "" for name in ("input", "system") if name in template.placeholders}
        missing = sorted(template.placeholders - optional.keys() - prompt.keys())
        if missing:
            had = ", ".join(map(repr, prompt))
            raise DataError(
                f"no field {missing[0]!r} for the template {template.name!r}", f"prompt {number}", f"it has {had}"
            )
        return template.prompt_of({**optional, **prompt})
    if "prompt" not in prompt:
        raise DataError(
            "a row without the field 'prompt', and no template to make one",
            f"prompt {number}",
            "name a template with --template",
        )
    return prompt["prompt"]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: JSONL rows where a line starts with a brace, else one prompt a line; blank lines skipped.

    Raises:
        DataError: no prompts, not UTF-8, or a broken row (with its line).
    """
    try:
        text = read_bytes(path, DataError, _LARGEST_PROMPT_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", path) from None
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError("no prompts", path)
    if not all(line.lstrip().startswith("{") for _, line in lines):
        return [line for _, line in lines]
    return [_row(line, f"{path}:{number}") for number, line in lines]


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = parse_json(line)
    except ValueError as fault:
        raise DataError(f"not valid JSON: {fault}", where) from None
    fields = {key: value for key, value in row.items() if isinstance(value, str)}
    if not fields:
        raise DataError("no text field in the row", where)
    return fields
