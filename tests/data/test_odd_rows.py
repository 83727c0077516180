"""Rows as data sets have them: each odd kind is read as its plain meaning and counted, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from odd_rows import ACCEPTED, LONG, REFUSED, qa

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.chat_template import built_in_chat_template
from llamatune.data.column_maps import PRESETS
from llamatune.data.encoding import EncodedBatch, Recipe, encode_batch
from llamatune.data.prepare_report import ADJUSTMENTS
from llamatune.data.raw_row import RawRow
from llamatune.data.row_formats import detect_format
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError
from llamatune.events import Event, Notice
from llamatune.strict_json import read_json
from llamatune.tokenizers.tokenizer import Tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer) -> Callable[..., EncodedBatch]:
    """A row in the format that is detected; ``template``: other than the format's own."""

    def encode(row: Any, template: Template | None = None) -> EncodedBatch:
        raw = RawRow(1, 0, json.dumps(row).encode())
        found = detect_format([raw])
        assert found is not None
        own = built_in_chat_template("llama2-chat", tokenizer) if found.name == "chat" else TEMPLATES[found.name]
        options = PrepareOptions(rows=[tokenizer.path], tokenizer=tokenizer.path, output=tokenizer.path.parent)
        return encode_batch(Recipe(tokenizer, template or own, found.name, options), [raw])

    return encode


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_row_is_read_as_its_plain_meaning_and_counted(encoded: Callable[..., EncodedBatch], name: str) -> None:
    row, plain, adjusted = ACCEPTED[name]
    made, expected = encoded(row), encoded(plain)
    assert made.refused == expected.refused == []
    assert (made.ids, made.targets, len(made.positions)) == (expected.ids, expected.targets, 1)
    assert made.adjusted == dict.fromkeys(adjusted, 1)
    assert made.keys == expected.keys, "equal rows are on one side of a split"
    assert all(kind in ADJUSTMENTS or kind.removeprefix("preset_") in PRESETS for kind in adjusted)


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_is_refused_by_name_with_its_line(
    prepare: Prepare, write_rows: WriteRows, name: str, tmp_path: Path
) -> None:
    row, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        prepare(write_rows([row]))
    assert caught.value.exit_code == 3
    assert message in str(caught.value)
    assert "rows.jsonl:1: " in str(caught.value) or "no known format" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "history",
    [
        [["u", "a"]],
        [{"user": "u", "assistant": "a"}],
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
        [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
        '[["u", "a"]]',
    ],
)
def test_a_history_in_every_form(encoded: Callable[..., EncodedBatch], history: Any) -> None:
    template = Template("own", "{instruction}:", turn="{user}: {assistant}\n")
    made = encoded(qa(history=history), template)
    assert made.refused == []
    assert made.ids == encoded(qa(history=[["u", "a"]]), template).ids
    assert len(made.ids) > len(encoded(qa(), template).ids)


def test_adjustments_are_told_and_recorded(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [LONG, *(ACCEPTED[name][0] for name in ("bot", "model", "two of the user's", "OpenOrca"))]
    notices: list[Event] = []
    report = prepare(write_rows(rows), on_event=notices.append)
    expected = {"preset_openorca": 1, "role_alias": 2, "turns_joined": 1}
    assert report.adjusted == expected
    assert read_json(tmp_path / "out" / "llamatune.json")["facts"]["adjusted"] == expected
    assert [event.message for event in notices if isinstance(event, Notice) and " rows: " in event.message] == [
        "1 of 5 rows: columns as --map openorca reads them (system=system_prompt,user=question,assistant=response)",
        "2 of 5 rows: roles by other names",
        "1 of 5 rows: messages of one role in a row, joined by an empty line",
    ]
    assert prepare(write_rows(rows)).adjusted == expected, "the report of a finished directory"
