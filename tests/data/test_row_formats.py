from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatune.data.raw_row import RawRow, RowError
from llamatune.data.row_formats import FORMATS, detect_format, row_of, strip_annotations, within_edits
from llamatune.data.row_json import decode_row

SAID = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


def _raw(row: Any) -> RawRow:
    return RawRow(1, 0, json.dumps(row).encode())


@pytest.mark.parametrize(
    ("name", "row", "fields", "completion"),
    [
        ("alpaca", {"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "input": "b"}, "c"),
        ("alpaca", {"instruction": "a", "output": "c"}, {"instruction": "a", "input": ""}, "c"),
        ("alpaca", {"instruction": "a", "input": None, "output": "c"}, {"instruction": "a", "input": ""}, "c"),
        ("gsm8k", {"question": "q", "answer": "1\n#### 1"}, {"question": "q"}, "1\n#### 1"),
        ("completion", {"prompt": "p", "completion": " c"}, {"prompt": "p"}, " c"),
        ("text", {"text": "t"}, {}, "t"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            {"user": "u", "system": ""},
            "a",
        ),
        (
            "chat",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            {"user": "u", "system": "s"},
            "a",
        ),
    ],
)
def test_every_format_is_read_and_detected(name: str, row: Any, fields: dict[str, str], completion: str) -> None:
    made = row_of(decode_row(_raw(row)), FORMATS[name])
    assert (made.fields, made.completion, made.turns) == (fields, completion, ())
    assert detect_format([_raw(row)]) is FORMATS[name]


def test_earlier_turns_of_a_chat() -> None:
    said = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    row = row_of({"messages": [{"role": r, "content": c} for r, c in said]}, FORMATS["chat"])
    assert (row.turns, row.fields["user"], row.completion) == ((("u1", "a1"),), "u2", "a2")


@pytest.mark.parametrize(
    ("name", "row", "kind", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "input": ""},
            "missing_field",
            "no field 'output'; the row has 'instruction', 'input'",
        ),
        ("alpaca", {}, "missing_field", "no field 'instruction'; the row has none"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty_field", "field 'output' of the row is empty"),
        ("alpaca", {"instruction": " \n", "output": "b"}, "empty_field", "field 'instruction' of the row is empty"),
        (
            "alpaca",
            {"instruction": "a", "output": 7},
            "wrong_type",
            "field 'output' of the row is a number, not a string",
        ),
        ("alpaca", {"instruction": "a", "output": None}, "missing_field", "no field 'output'"),
        (
            "alpaca",
            {"instruction": "a", "input": ["x"], "output": "b"},
            "wrong_type",
            "field 'input' of the row is a list",
        ),
        (
            "alpaca",
            {"instruction": "a", "outptu": "b"},
            "unknown_field",
            "unknown field 'outptu', did you mean 'output'?",
        ),
        ("alpaca", {"instruction": "a", "Output": "b"}, "unknown_field", "did you mean 'output'?"),
        ("alpaca", {"instruction": "a\0", "output": "b"}, "bad_characters", "a NUL character in field 'instruction'"),
        ("gsm8k", {"question": "a", "answers": "b"}, "unknown_field", "did you mean 'answer'?"),
        ("chat", {"messages": "hi"}, "wrong_type", "field 'messages' of the row is a string, but not of JSON: "),
        ("chat", {"messages": {"role": "user"}}, "wrong_type", "field 'messages' of the row is an object, not a list"),
        ("chat", {"messages": []}, "bad_messages", "no assistant message at its end"),
        ("chat", {"messages": [{"role": "user", "content": "u"}]}, "bad_messages", "no assistant message at its end"),
        (
            "chat",
            {"messages": [{"role": "user"}]},
            "missing_field",
            "no field 'content'; message 1 of 'messages' has 'role'",
        ),
        (
            "chat",
            {"messages": [{"role": "tool", "content": "x"}]},
            "bad_messages",
            "no assistant message at its end",
        ),
        (
            "chat",
            {"messages": [{"role": "assistant", "content": "x"}]},
            "bad_messages",
            "no message of the user before the assistant's",
        ),
        ("chat", {"messages": SAID, "conversations": TURNS}, "bad_messages", "both 'messages' and 'conversations'"),
        ("text", {"txt": "b"}, "unknown_field", "did you mean 'text'?"),
    ],
)
def test_d1_d4_d16_rows_that_do_not_fit(name: str, row: Any, kind: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        row_of(decode_row(_raw(row)), FORMATS[name])
    assert caught.value.kind == kind
    assert message in caught.value.message


def test_d16_other_keys_are_ignored_and_told() -> None:
    row = {"instruction": "a", "output": "b", "text": "whole", "id": 7, "source": {"url": "x"}}
    assert row_of(decode_row(_raw(row)), FORMATS["alpaca"]).ignored_keys == ("text", "id", "source")


def test_detection_looks_past_unusable_rows_and_prefers_alpaca_to_its_text_key() -> None:
    usable = {"text": "whole", "instruction": "a", "output": "b"}
    rows = [RawRow(1, 0, b"{broken"), _raw([1]), _raw({"question": "no answer"}), _raw(usable)]
    assert detect_format(rows) is FORMATS["alpaca"]
    assert detect_format(rows[:3]) is FORMATS["gsm8k"]
    assert detect_format(rows[:2]) is None
    assert detect_format([_raw({"name": "x"})]) is None


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "text",
            {"text": "t", "sex": "f", "dept": "x", "team": "y", "test": 1, "texts": [], "history": "old", "tools": 3},
        ),
        (
            "alpaca",
            {"instruction": "i", "input": "", "output": "o", "outputs": 3, "inputs": 1, "story": "s", "index": 0},
        ),
        ("gsm8k", {"question": "q", "answer": "a", "answers": ["a"], "questions": 1}),
        ("completion", {"prompt": "p", "completion": "c", "prompts": 2, "completions": "d"}),
        ("chat", {"messages": SAID, "message": "m", "conversation": 4}),
        ("chat", {"conversations": TURNS, "conversation": 4, "message": "m", "messages_": 0}),
    ],
)
def test_a_column_is_no_misspelling_of_a_field_that_is_there(name: str, row: dict[str, Any]) -> None:
    made = row_of(decode_row(_raw(row)), FORMATS[name])
    assert set(made.ignored_keys) == row.keys() - set(FORMATS[name].keys)


@pytest.mark.parametrize(
    ("name", "row", "known"),
    [
        ("alpaca", {"instruction": "i", "output": "o", "inputs": "x"}, "input"),
        ("alpaca", {"instruction": "i", "output": "o", "INPUT": "x"}, "input"),
        ("alpaca", {"instruction": "i", "output": "o", "sytem": "x"}, "system"),
        ("chat", {"message": SAID}, "messages"),
        ("chat", {"messages": SAID, "systems": "x"}, "system"),
        ("completion", {"prompt": "p", "completions": "c"}, "completion"),
    ],
)
def test_a_key_close_to_a_field_that_is_absent_is_a_misspelling(name: str, row: dict[str, Any], known: str) -> None:
    with pytest.raises(RowError, match=f"did you mean '{known}'"):
        row_of(decode_row(_raw(row)), FORMATS[name])


def test_a_system_field_and_a_history_are_read() -> None:
    for messages in ({"conversations": TURNS}, {"messages": SAID}):
        assert row_of({"system": "Be kind.", **messages}, FORMATS["chat"]).fields == {"user": "u", "system": "Be kind."}
    own = [{"from": "system", "value": "s"}, *TURNS]
    assert row_of({"system": "s", "conversations": own}, FORMATS["chat"]).fields["system"] == "s"
    with pytest.raises(RowError, match="both a field 'system' and a system message"):
        row_of({"system": "other", "conversations": own}, FORMATS["chat"])
    row = {"instruction": "i", "output": "o", "system": "s", "history": [["u1", "a1"], ["u2", "a2"]]}
    made = row_of(row, FORMATS["alpaca"])
    assert made.fields == {"instruction": "i", "input": "", "system": "s"}
    assert made.turns == (("u1", "a1"), ("u2", "a2"))
    assert made.ignored_keys == ()


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chat", {"tools": "f", "messages": SAID}, "field 'tools' of the row is a string, but not of JSON"),
        ("chat", {"tools": ["f"], "messages": SAID}, "field 'tools' of the row is a list, not a list of objects"),
        ("chat", {"functions": [{"name": "f"}], "messages": SAID}, "field 'functions' would be lost"),
        ("chat", {"history": [["u", "a"]], "messages": SAID}, "field 'history' would be lost"),
        ("chat", {"images": ["a.png"], "conversations": TURNS}, "field 'images' would be lost"),
        ("chat", {"system": 7, "messages": SAID}, "field 'system' of the row is a number, not a string"),
        ("chat", {"weight": 0, "messages": SAID}, "the row has a 'weight' other than 1"),
        ("alpaca", {"instruction": "i", "output": "o", "history": "u"}, "'history' of the row is a string, but not of"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["u", ""]]}, "message 2 of 'history' is empty"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["u"]]}, "a list of [user, assistant] pairs"),
        ("alpaca", {"instruction": "i", "output": "o", "tools": ["f"]}, "field 'tools' would be lost: alpaca rows"),
        ("gsm8k", {"question": "q", "answer": "a", "system": "s"}, "field 'system' would be lost: gsm8k rows"),
        ("completion", {"prompt": "p", "completion": "c", "system": "s"}, "field 'system' would be lost: completion"),
    ],
)  # fmt: skip
def test_content_that_would_be_lost_is_refused_by_name(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        row_of(decode_row(_raw(row)), FORMATS[name])
    assert message in caught.value.message


@pytest.mark.parametrize(
    "extra",
    [
        {"weight": 2}, {"weight": 0.5}, {"train": "no"}, {"loss": [0]}, {"tool_calls": [{"id": "1"}]},
        {"function_call": {"arguments": "{}"}}, {"reasoning_content": "hm"}, {"images": ["a.png"]}, {"mask": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_keys_of_messages_that_hold_content_or_weight_are_refused_by_name(key: str, extra: dict[str, Any]) -> None:
    said = SAID if key == "messages" else TURNS
    with pytest.raises(RowError) as caught:
        row_of({key: [said[0], {**said[1], **extra}]}, FORMATS["chat"])
    assert f"message 2 of '{key}' has " in caught.value.message
    assert repr(next(iter(extra))) in caught.value.message


@pytest.mark.parametrize("extra", [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"weight": 0, "train": False}])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_message_that_is_not_to_be_trained_says_so(key: str, extra: dict[str, Any]) -> None:
    said = SAID if key == "messages" else TURNS
    made = row_of({key: [said[0], {**said[1], **extra}, said[0], {**said[1], "weight": 1}]}, FORMATS["chat"])
    assert made.trained == (False, True)
    assert row_of({key: [{**said[0], **extra}, said[1]]}, FORMATS["chat"]).trained == (), (
        "of the user's it changes nothing"
    )
    with pytest.raises(RowError, match=r"message 2 of .* has 'weight' and 'loss', which contradict each other"):
        row_of({key: [said[0], {**said[1], "weight": 1, "loss": 0}]}, FORMATS["chat"])


def test_empty_keys_metadata_and_default_weights_may_pass() -> None:
    extra = {"weight": 1, "train": True, "tool_calls": [], "function_call": None, "name": "Ann", "message_id": "x"}
    row = {"messages": [SAID[0], {**SAID[1], **extra}], "tools": "[]", "system": "", "history": [], "weight": 1.0}
    made = row_of(row, FORMATS["chat"])
    assert (made.fields, made.completion) == ({"user": "u", "system": ""}, "a")
    assert made.ignored_keys == ("history", "weight", "messages[].message_id", "messages[].name")


@given(st.text(max_size=8), st.text(max_size=8))
def test_two_edits_is_symmetric_and_true_of_equals(left: str, right: str) -> None:
    assert within_edits(left, right, 2) == within_edits(right, left, 2)
    assert within_edits(left, left, 2)
    assert within_edits(left, left + "xy", 2)
    assert not within_edits(left, left + "xyz", 2)


def test_annotations_are_stripped_and_nothing_else() -> None:
    assert strip_annotations("48/2 = <<48/2=24>>24 clips <<1+1=2>>2 << 3") == "48/2 = 24 clips 2 << 3"
