"""From prompts as a user writes them to completions as text, before and after tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.data.prompts import Template, load_template
from llamatune.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from llamatune.devices import memory_faults
from llamatune.errors import CheckpointError, DataError, SpecError
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.files import MANIFEST, parse_json, read_bytes, read_json
from llamatune.inference.generate import Completion, complete
from llamatune.inference.sampling import Sampling
from llamatune.model.lora import apply_lora, load_lora
from llamatune.model.transformer import Transformer

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
    if request.compare and request.adapter is None:
        raise SpecError("--compare needs two models", None, "give the tuned one with --adapter")
    checkpoint = open_checkpoint(request.model)
    tokenizer = load_tokenizer(request.model)
    check_vocabulary(tokenizer, checkpoint.config.vocab_size, request.model)
    adapter = None
    if request.adapter is not None:
        adapter = load_adapter(request.adapter)
        check_adapter(adapter, checkpoint.config, fingerprint(checkpoint), request.force_base, on_event)
    template = _template(request, adapter)
    texts = [_prompt_text(prompt, template, number) for number, prompt in enumerate(request.prompts, 1)]
    ids = [tokenizer.encode(text) for text in texts]
    device = request.device or torch.device("cpu")
    with memory_faults(device):
        return _answer(request, checkpoint, tokenizer, adapter, texts, ids, on_event, should_stop)


def _answer(
    request: Request,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    adapter: Adapter | None,
    texts: list[str],
    ids: list[list[int]],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> Answers:
    model = load_model(
        checkpoint, _dtype(request, checkpoint, on_event), request.device or "cpu", on_event=on_event,
        should_stop=should_stop,
    )  # fmt: skip
    model.eval()
    eos_ids = {*checkpoint.config.eos_token_ids, tokenizer.eos_id}

    def run(task: str) -> tuple[list[Completion], float]:
        started, done = monotonic(), []
        for first in range(0, len(ids), _BATCH):
            done += complete(model, ids[first : first + _BATCH], request.sampling, eos_ids, should_stop)
            on_event(Progress(task, len(done), len(ids)))
        return done, sum(len(found.ids) for found in done) / max(monotonic() - started, 1e-9)

    before = run("generating with the base")[0] if request.compare else None
    if adapter is not None:
        _put_on(model, adapter)
    completions, speed = run("generating")
    results = [
        Answer(
            text,
            _continuation(tokenizer, prompt, found.ids),
            found.ids,
            found.finish_reason,
            None if before is None else _continuation(tokenizer, prompt, before[index].ids),
        )
        for index, (text, prompt, found) in enumerate(zip(texts, ids, completions, strict=True))
    ]
    return Answers(results, speed)


def _put_on(model: Transformer, adapter: Adapter) -> None:
    config = adapter.config
    apply_lora(model, config.r, config.scaling * config.r, 0.0, config.target_modules)
    load_lora(model, adapter.tensors)
    model.requires_grad_(False)


def _dtype(request: Request, checkpoint: Checkpoint, on_event: OnEvent) -> torch.dtype | None:
    on_cpu = request.device is None or request.device.type == "cpu"
    if request.dtype is None and on_cpu and checkpoint.dtype("model.embed_tokens.weight") == torch.float16:
        on_event(Notice("computing in fp32, since fp16 is very slow on a CPU; --dtype bfloat16 takes half the memory"))
        return torch.float32
    return request.dtype


def _template(request: Request, adapter: Adapter | None) -> Template | None:
    if request.template == "none":
        return None
    if request.template is not None:
        return load_template(request.template)
    stored = adapter.template if adapter is not None else _stored_template(request.model)
    return None if stored is None else Template.from_dict(stored, request.adapter or request.model)


def _stored_template(model: Path) -> dict[str, Any] | None:
    if not (model / MANIFEST).is_file():
        return None
    facts = read_json(model / MANIFEST, max_bytes=16 << 20).get("facts")
    stored = facts.get("template") if isinstance(facts, dict) else None
    if not isinstance(stored, dict | None):
        raise CheckpointError("the template is malformed", model / MANIFEST)
    return stored


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


def _continuation(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add to the prompt: decoding them alone would lose a space at their start."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


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
