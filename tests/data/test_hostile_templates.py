"""Hostile chat templates: nothing runs, nothing hangs, no signal; an error of one line, or a harmless text."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_templates import BROKEN, DEEP, ENDLESS, ESCAPES, LARGE, SOUND, mutations

from llamatune.data import jinja_engine
from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.chat_template import ChatTemplate
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.tokenizers.tokenizer import Tokenizer

SAID = [{"role": "user", "content": "What is green?"}]
LEAKS = ("[<class", "module 'os'", "__builtins__", "wrapper_descriptor")


def outcome_of(source: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The error, or the text that was written; and whether it is a text."""
    template = ChatTemplate("model", source, {"bos_token": "<s>", "eos_token": "</s>"}, where="tokenizer_config.json")
    started = time.monotonic()
    try:
        encoder = ChatEncoder(template, tokenizer)
        _ = encoder.probe, encoder.stop_id, encoder.ends_untrained
        shown, is_text = encoder.prompt(SAID).shown, True
    except LlamatuneError as fault:
        shown, is_text = str(fault), False
        assert fault.exit_code in (3, 4), shown
        assert "\n" not in shown
        assert "\x1b" not in shown
        assert len(shown) < 1000
    assert time.monotonic() - started < 60
    return shown, is_text


def check(source: str, tokenizer: Tokenizer, directory: Path) -> str:
    canary = directory / "canary"
    shown, is_text = outcome_of(source.replace("CANARY", str(canary)), tokenizer)
    assert not canary.exists()
    assert SAID == [{"role": "user", "content": "What is green?"}]
    assert not [leak for leak in LEAKS if leak in shown and is_text], shown[:500]
    assert "root:" not in shown
    return shown


@pytest.mark.parametrize("number", [1, 3])
def test_what_never_ends_is_ended(tokenizer: Tokenizer, tmp_path: Path, number: int) -> None:
    shown = check(ENDLESS[number], tokenizer, tmp_path)
    assert "it takes more than 2 s of processor time" in shown or "MiB of memory" in shown


@pytest.mark.parametrize("source", [*LARGE[:8], *DEEP[:3], DEEP[6], *ESCAPES[:8], *ESCAPES[19:21], *BROKEN[:4]])
def test_memory_depth_and_the_sandbox_hold(tokenizer: Tokenizer, tmp_path: Path, source: str) -> None:
    check(source, tokenizer, tmp_path)


@pytest.mark.slow
def test_two_hundred_hostile_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    known = [*ENDLESS, *LARGE, *DEEP, *ESCAPES, *BROKEN]
    errors = 0
    for source in [*known, *mutations(200 - len(known) + 60, 21)]:
        shown = check(source, tokenizer, tmp_path)
        errors += "the chat template" in shown
    assert errors > 100


def test_a_sound_template_is_rendered_there(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("model", SOUND, {"bos_token": "<s>", "eos_token": "</s>"})
    encoder = ChatEncoder(template, tokenizer)
    assert encoder.prompt(SAID).shown == "<s>[What is green?]>"
    again = pickle.loads(pickle.dumps(template))  # as a worker process receives it
    assert ChatEncoder(again, tokenizer).prompt(SAID).shown == "<s>[What is green?]>"
    assert template.engine is not again.engine


def test_the_process_ends_with_its_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("model", SOUND, {})
    process: Any = template.engine
    child = process._child
    assert child.poll() is None
    del template, process
    assert child.returncode is not None


def test_the_process_has_no_files_no_processes_and_little_memory(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("model", SOUND, {"bos_token": "", "eos_token": ""})
    process: Any = template.engine
    limits = Path(f"/proc/{process._child.pid}/limits").read_text()
    found = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()[1:]}
    assert found["Max address space"] == [str(512 << 20)] * 2
    assert found["Max processes"] == found["Max core file size"] == found["Max file size"] == ["0", "0"]
    files = os.listdir(f"/proc/{process._child.pid}/fd")
    assert found["Max open files"] == [str(len(files))] * 2, "every descriptor that it may have is taken"


def test_a_reply_that_is_none_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that had taken over its process could answer anything."""
    for reply in ({}, {"text": 7}, {"text": "a", "blocks": [[0, 9]], "before": [0], "through": [1]}, {"text": "a"},
                  {"text": "a", "blocks": [[0]], "before": [0], "through": [1]},
                  {"text": "a", "blocks": [], "before": [True], "through": [1]}):  # fmt: skip
        template = ChatTemplate("model", SOUND, {})
        monkeypatch.setattr(type(template.engine), "reply", lambda _, request, reply=reply: reply)
        with pytest.raises(CheckpointError, match="another answer than was asked for"):
            _ = ChatEncoder(template, tokenizer).probe


def test_the_engine_knows_what_chat_templates_use() -> None:
    source = (
        "{%- for m in messages if m.role != 'x' %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {{ m | tojson }}{{ [1, {'a': '<é>'}] | tojson(indent=1) }}{{ strftime_now('%Y') }}\n"
        "{% endfor %}{{ dict(a=1).a }}{{ dict.fromkeys('ab', 2) }}"
        "{% set n = namespace(x=1) %}{% set n.y = 2 %}{{ n.x + n.y }}"
        "{{ tools is none }}{{ documents is none }}{{ nothing }}"
    )
    engine = jinja_engine.Engine(source, {}, "2024-07-26T00:00:00")
    shown = engine.render([{"role": "user", "content": "a<b"}, {"role": "x", "content": "c"}])
    assert shown == (
        '  {"role": "user", "content": "a<b"}[\n 1,\n {\n  "a": "<é>"\n }\n]2024\n1{\'a\': 2, \'b\': 2}3TrueTrue'
    )


@pytest.mark.parametrize(("file", "code"), [("mine.jinja", 2), ("tokenizer_config.json", 4), ("llamatune.json", 4)])
def test_every_verb_says_so_in_one_line(
    command: Callable[..., Any], tiny_base: Callable[..., Path], tmp_path: Path, file: str, code: int
) -> None:
    source, model = "{{ 'a' * 10 ** 9 }}", tmp_path / "model"
    shutil.copytree(tiny_base(), model)
    (model / "mine.jinja").write_text(source)
    options: dict[str, tuple[object, ...]] = {"mine.jinja": ("--template", model / "mine.jinja"), "llamatune.json": ()}
    if file == "tokenizer_config.json":
        (model / file).write_text(json.dumps({"chat_template": source}))
    if file == "llamatune.json":
        stored = {"name": "x", "chat_template": source, "variables": {}}
        manifest = {"kind": "model", "schema": 1, "inputs": {}, "facts": {"template": stored}}
        files = {"config.json": {"bytes": 1, "sha256": "0" * 64}}
        (model / file).write_text(json.dumps({**manifest, "files": files}))
    outcome = command("generate", "--model", model, "--prompt", "a", *options.get(file, ("--template", "model")))
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert "512 MiB of memory" in outcome.stderr
    assert outcome.code == code
