"""The homes of a chat template: read as transformers reads them, written where every reader looks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llamatune.events import Event, Notice
from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer

ONE, OTHER = "{{ messages[0].content }}é\n", "{{ 'other' }}"
NAMED = [{"name": "default", "template": ONE}, {"name": "tool_use", "template": OTHER}]


@pytest.fixture
def base(json_tokenizers: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A directory with a tokenizer, what its configuration says of templates, and template files."""

    def make(stated: Any = None, **files: str) -> Path:
        path = tmp_path / "base"
        shutil.copytree(json_tokenizers["llama_3"], path)
        if stated is not None:
            facts = json.loads((path / "tokenizer_config.json").read_text())
            (path / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": stated}))
        for name, text in files.items():
            file = path / f"{name.replace('__', '/')}.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return path

    return make


CASES: dict[str, tuple[Any, dict[str, str], Any, bool | None]] = {
    "of transformers 4": (ONE, {}, ONE, True),
    "of transformers 5": (None, {"chat_template": ONE}, ONE, True),
    "in both": (ONE, {"chat_template": ONE}, ONE, True),
    "in both, differing": (OTHER, {"chat_template": ONE}, ONE, True),
    "several, of transformers 4": (NAMED, {}, NAMED, False),
    "several, of transformers 5": (
        None, {"chat_template": ONE, "additional_chat_templates__tool_use": OTHER}, ONE, True,
    ),
    "several and one of them": (NAMED, {"chat_template": ONE}, NAMED, None),
    "several and another": (NAMED, {"chat_template": OTHER}, OTHER, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_template_is_written_for_every_reader(base: Callable[..., Path], tmp_path: Path, case: str) -> None:
    stated, files, expected, alone = CASES[case]
    source, output, events = base(stated, **files), tmp_path / "out", list[Event]()
    output.mkdir()
    copy_huggingface_tokenizer(source, output, events.append)
    assert json.loads((output / "tokenizer_config.json").read_text())["chat_template"] == expected
    if alone:
        assert (output / "chat_template.jinja").read_text() == expected
    elif alone is False:
        assert not (output / "chat_template.jinja").exists()
    before, after = (AutoTokenizer.from_pretrained(path).chat_template for path in (source, output))
    assert before == after
    told = [event.message for event in events if isinstance(event, Notice)]
    assert len(told) == (case in ("in both, differing", "several and another"))
    assert all("another chat template than chat_template.jinja, which is used" in text for text in told)


def test_without_a_template_nothing_is_changed(base: Callable[..., Path], tmp_path: Path) -> None:
    source, output = base(), tmp_path / "out"
    output.mkdir()
    copy_huggingface_tokenizer(source, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


@pytest.mark.parametrize("stated", [7, [7], [{"name": "default"}], {"default": ONE}])
def test_what_is_no_template_stays_as_it_is(base: Callable[..., Path], tmp_path: Path, stated: Any) -> None:
    source, output = base(stated), tmp_path / "out"
    output.mkdir()
    copy_huggingface_tokenizer(source, output)
    assert (output / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
