"""From prompts as a user writes them to completions as text, before and after tuning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from llamatune.data.decoding import Row, decode_row, decode_value, kind_of
from llamatune.data.formats import prompt_row_of
from llamatune.data.prompts import Template
from llamatune.data.rows import RawRow, RowError, read_raw_rows
from llamatune.errors import DataError
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.files import parse_json, read_bytes
from llamatune.inference.generate import Completion, complete
from llamatune.inference.opened import open_model
from llamatune.inference.sampling import Sampling
from llamatune.out_of_memory import memory_faults
from llamatune.threads import suitable_threads

_BATCH = 16
_LARGEST_PROMPT_FILE = 256 << 20

_ROW_SUFFIXES = (".json", ".jsonl", ".ndjson")
_ROWS_BEGIN = re.compile(rb"""\s*(?:\{\s*["']|\[\s*(?:\{\s*["']|["']))""")
"""How a file of rows or a list of prompts begins; ``[INST] Hi`` and ``{name} is`` begin otherwise."""

Prompt = str | Mapping[str, str] | Row
"""A user's message, or a row: its fields by name, or one of a file."""


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
    ids = opened.encode(tokenizer, texts, request.sampling.max_new_tokens, on_event)
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
    row, where = prompt if isinstance(prompt, Row) else Row(dict(prompt), ""), f"prompt {number}"
    if template is None or not template.placeholders:
        text = row.fields.get("prompt", row.fields.get("text"))
        if text is None:
            raise DataError(
                "a row without the field 'prompt', and no template to make one",
                where,
                "name a template with --template",
            )
        return text if template is None else template.instruction_prompt(text)
    optional: dict[str, str] = {name: "" for name in ("input", "system") if name in template.placeholders}
    for name in sorted(template.placeholders - optional.keys() - row.fields.keys()):
        what = "a field that is no text," if name in row.ignored_keys else "no field"
        had = ", ".join(map(repr, row.fields)) or "none"
        raise DataError(f"{what} {name!r} for the template {template.name!r}", where, f"it has the texts {had}")
    if misfit := template.misfit(row):
        raise DataError(misfit, where)
    return template.prompt_of({**optional, **row.fields}, row.turns)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: rows as ``prepare-data`` reads them, or plain text, one prompt a line; blank lines skipped.

    A file holds rows if its name ends in .json, .jsonl or .ndjson, or if it begins as JSON does. A list may hold texts.

    Raises:
        DataError: no prompts, not UTF-8, a row that cannot be used (with its place), or rows between plain lines.
    """
    content = read_bytes(path, DataError, _LARGEST_PROMPT_FILE)
    if path.suffix.lower() in _ROW_SUFFIXES or _begins_as_rows(content):
        prompts = [_row_prompt(raw, path) for raw in read_raw_rows(path)]
    else:
        prompts = list(_plain_prompts(content, path))
    if not prompts:
        raise DataError("no prompts", path)
    return prompts


def _begins_as_rows(content: bytes) -> bool:
    content = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _ROWS_BEGIN.match(content) or (content.startswith(b"{") and _is_object(content.split(b"\n", 1)[0])):
        return True
    try:
        return content.startswith(b"[") and isinstance(parse_json(content), list)
    except ValueError:
        return False


def _is_object(line: bytes) -> bool:
    try:
        decode_row(RawRow(1, 0, line.strip()))
    except RowError:
        return False
    return True


def _plain_prompts(content: bytes, path: Path) -> Iterator[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", path) from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("{") and _is_object(line.encode()):
            raise DataError(
                "a JSON row in a file that begins as plain text", f"{path}:{number}", "let every line be a row, or none"
            )
        if line.strip():
            yield line.rstrip("\r")


def _row_prompt(raw: RawRow, path: Path) -> Prompt:
    try:
        value = decode_value(raw)
        if isinstance(value, str) and value.strip():
            return value
        if not isinstance(value, dict):
            what = "an empty text" if isinstance(value, str) else kind_of(value)
            raise RowError("not_an_object", f"{what} where a row or a prompt is expected")
        return prompt_row_of(value)
    except RowError as fault:
        todo = "mend it, or give plain prompts one a line in a .txt file that does not begin as JSON does"
        raise DataError(fault.message, raw.place(path), todo) from None
