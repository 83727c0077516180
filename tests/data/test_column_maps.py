"""``--map``: columns under other names, and presets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from odd_rows import LONG, PLAIN, SYSTEM, TEXTS, qa
from prepared_rows import read_split

from llamatune.data.chat_messages import CALLER, ROLES
from llamatune.data.column_maps import MAPPABLE, PRESETS
from llamatune.data.prepare_report import ADJUSTMENTS
from llamatune.data.row_formats import FORMATS
from llamatune.errors import DataError, SpecError
from llamatune.strict_json import read_json

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]


@pytest.mark.parametrize(
    ("given", "row", "plain", "ignored"),
    [
        ("instruction=query,output=response", {"query": "two apples", "response": "seven"}, qa(), {}),
        (" instruction = q , output=r", {"q": "two apples", "r": "seven", "id": 3}, qa(), {"id": 1}),
        ("dolly", {"instruction": "two apples", "context": "rain", "response": "seven"}, qa(input="rain"), {}),
        ("output=gold", qa(answer="wrong", gold="seven"), qa(), {"output": 1}),
        ("instruction=output,output=instruction", qa("seven", "two apples"), qa(), {}),
        (
            "instruction=meta.ask,output=meta.said[1]",
            {"meta": {"ask": "two apples", "said": ["x", "seven"]}},
            qa(),
            {"meta": 1},
        ),
        ("output=out[0]", {"instruction": "two apples", "out[0]": "seven"}, qa(), {}),
        ("text=content", {"content": "two apples"}, {"text": "two apples"}, {}),
        ("messages=chosen", {"chosen": PLAIN["messages"], "rejected": []}, PLAIN, {"rejected": 1}),
        ("user=q,assistant=a,system=s", {"q": "two apples", "a": "seven", "s": "stone"}, SYSTEM, {}),
        ("user=q,assistant=a,system=s", {"q": "two apples", "a": "seven", "s": None}, PLAIN, {}),
        ("ultrachat", {"id": "0", "data": [*TEXTS, "hills", "green"]}, LONG, {"id": 1}),
        (
            "squad",
            {"context": "c", "question": "q", "answers": {"text": ["a", "b"]}},
            qa("q", "a", input="c"),
            {"answers": 1},
        ),
    ],
)
def test_columns_are_read_as_fields(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path, given: str, row: Any, plain: Any, ignored: dict[str, int]
) -> None:
    report = prepare(write_rows([row]), column_map=given)
    assert report.ignored_keys == ignored
    prepare(write_rows([plain], "plain.jsonl"), output=tmp_path / "plain")
    assert read_split(tmp_path / "out") == read_split(tmp_path / "plain")
    assert "map" in read_json(tmp_path / "out" / "llamatune.json")["inputs"]
    for name in (report.format, "auto"):
        with pytest.raises(DataError, match=r"no column .* \(.*=.* of --map\); the row has 'other'"):
            prepare(write_rows([{"other": 1}]), column_map=given, overwrite=True, format=name)


def test_a_column_for_an_optional_field_may_lack_and_is_counted(prepare: Prepare, write_rows: WriteRows) -> None:
    rows = [{"q": "two apples", "r": "seven", "c": "x"}, {"q": "two apples", "r": "seven"}]
    assert prepare(write_rows(rows), column_map="instruction=q,output=r,input=c").adjusted == {"no_column": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dollly", "'dollly' is neither FIELD=COLUMN nor a preset: --map: presets: dolly, "),
        ("instruction=a,b", "'b' is neither FIELD=COLUMN nor a preset"),
        ("instructions=a", "there is no field 'instructions': --map: fields: instruction, input, output, "),
        ("output=a,output=b", "the field 'output' is given twice"),
        ("output=", "no column for the field 'output'"),
        ("user=a", "'user' and 'assistant' make a chat together"),
    ],
)
def test_a_map_that_is_none_is_refused(prepare: Prepare, write_rows: WriteRows, given: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        prepare(write_rows([qa()]), column_map=given)
    assert message in str(caught.value)


def test_the_docs_name_every_alias_preset_and_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    aliases = {alias for role, names in ROLES.items() if role != CALLER for alias in names}
    missing = [name for name in (*aliases, *PRESETS, *ADJUSTMENTS) if f"`{name}`" not in page]
    assert not missing


def test_every_field_of_a_format_can_be_mapped() -> None:
    fields = {field for known in FORMATS.values() for field in known.keys + known.context}
    assert fields - {"earlier messages"} == set(MAPPABLE) - {"user", "assistant"}
