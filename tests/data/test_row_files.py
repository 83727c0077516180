from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.data import json_elements
from llamatune.data.raw_row import LARGEST_ROW_BYTES, RawRow, RowError
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import detect_format
from llamatune.data.row_json import decode_row
from llamatune.errors import DataError, LlamatuneError

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=3))
ROWS = st.lists(st.dictionaries(TEXT, VALUES | st.dictionaries(TEXT, VALUES, max_size=2), max_size=4), max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.json"


def _read(path: Path, content: bytes) -> list[RawRow]:
    path.write_bytes(content)
    return list(read_raw_rows(path))


def _values(path: Path, content: bytes) -> list[Any]:
    return [decode_row(raw) for raw in _read(path, content)]


def _messages(path: Path, content: bytes) -> list[str | None]:
    found: list[str | None] = []
    for raw in _read(path, content):
        try:
            decode_row(raw)
            found.append(None)
        except RowError as fault:
            found.append(f"{raw.line}: {fault.message}")
    return found


@given(
    rows=ROWS, indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), portion=st.sampled_from([1, 3, 17, 1 << 20])
)
@settings(max_examples=200, deadline=None)
def test_a_json_list_and_json_lines_give_the_same_rows(
    path: Path, rows: list[Any], indent: int | None, ascii_only: bool, portion: int
) -> None:
    listed = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_elements, "_PORTION", portion)
        assert _values(path, listed) == rows
    assert _values(path, lines) == rows


@given(content=st.binary(max_size=200) | st.text(alphabet='[]{},:"\\ \n1a\0', max_size=60).map(str.encode))
@settings(max_examples=400, deadline=None)
def test_arbitrary_bytes_only_raise_documented_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        raws = list(read_raw_rows(path))
    except LlamatuneError as fault:
        assert isinstance(fault, DataError)
        return
    for raw in raws:
        assert raw.line >= 1
        assert 0 <= raw.offset <= len(content)
        try:
            assert isinstance(decode_row(raw), dict)
        except RowError as fault:
            assert fault.kind
            assert fault.message
    detect_format(iter(raws))


def test_d2_bom_crlf_blank_lines_and_no_final_newline_alter_nothing(path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    first, second = (json.dumps(row).encode() for row in rows)
    for content in (
        first + b"\n" + second + b"\n",
        b"\xef\xbb\xbf" + first + b"\n" + second,
        first + b"\r\n\r\n  \t\r\n" + second + b"\r\n\n",
        b"\n\n" + first + b"\n" + second,
        b"\xef\xbb\xbf[" + first + b",\r\n" + second + b"]\r\n",
        b"\n [ " + first + b" , " + second + b" ] ",
    ):
        assert _values(path, content) == rows
    assert [raw.line for raw in _read(path, b"\n" + first + b"\n\n" + second)] == [2, 4]
    assert [raw.line for raw in _read(path, b"[\n" + first + b",\n\n" + second + b"\n]")] == [2, 4]


def test_a_row_of_a_list_is_called_by_its_number_and_by_its_line_where_that_tells_something(path: Path) -> None:
    rows: list[Any] = [{"text": "a"}, {"text": "b"}, 7]

    def places(text: str) -> list[str]:
        return [raw.place("f") for raw in _read(path, text.encode())]

    assert places(json.dumps(rows)) == ["f: row 1", "f: row 2", "f: row 3"]
    assert places(json.dumps(rows, indent=1)) == ["f:2: row 1", "f:5: row 2", "f:8: row 3"]
    assert places("\n" + "\n\n".join(map(json.dumps, rows))) == ["f:2: row 1", "f:4: row 2", "f:6: row 3"]
    assert places("\n".join(map(json.dumps, rows))) == ["f:1", "f:2", "f:3"]
    assert places("[{}, , {}, {") == ["f: row 1", "f: row 2", "f: row 3", "f: row 4"]
    assert places("[{}] x") == ["f: row 1", "f: row 2"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_d2_utf_16_is_named(path: Path, encoding: str) -> None:
    path.write_bytes('{"text": "é"}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"rows\.json:1: convert it: iconv") as caught:
        list(read_raw_rows(path))
    assert "UTF-16" in str(caught.value)
    assert caught.value.exit_code == 3


def test_d2_latin_1_is_named_with_line_and_byte(path: Path) -> None:
    content = b'{"text": "ok"}\n{"text": "caf\xe9"}\n'
    at = content.index(b"\xe9")
    assert _messages(path, content) == [
        None, f"2: byte 0xe9 at byte {at} of the file is not UTF-8 (Latin-1 text? iconv converts it)"
    ]  # fmt: skip


def test_d3_other_line_separators_stay_inside_a_row(path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c\u2029d\x0b\x0ce"}]
    assert _values(path, json.dumps(rows[0], ensure_ascii=False).encode() + b"\n") == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a', "not valid JSON: a text that does not end, which begins"),
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "a whole number of thousands of digits"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
        ('{"text": "a", "text": "b"}', "the key 'text' appears twice"),
        ('{"text": "\\ud800"}', "a lone surrogate, which is no character, in field 'text'"),
        ('{"id": {"deep": ["\\udfff"]}, "text": "a"}', "a lone surrogate, which is no character, in field 'id'"),
        ('{"text": "a\tb"}', "a control character within a text"),
        ("[1, 2]x", "something follows the value"),
        ("17", "a number where a row, a JSON object, is expected"),
        ("null", "null where a row"),
        ("{'text': 'a'}", "a key in double quotes is expected at column 2"),
    ],
)
def test_d1_d5_d16_rows_that_are_no_json(path: Path, row: str, message: str) -> None:
    content = b'{"text": "fine"}\n' + row.encode() + b'\n{"text": "fine"}\n'
    before, bad, after = _messages(path, content)
    assert (before, after) == (None, None)
    assert bad is not None
    assert bad.startswith("2: ")
    assert message in bad


@pytest.mark.parametrize("listed", [False, True])
def test_d5_a_huge_row_is_refused_without_being_held(path: Path, listed: bool) -> None:
    row = b'{"text": "' + b"x" * 24_000_000 + b'"}'
    small = b'{"text": "a"}'
    path.write_bytes(
        b"[" + small + b",\n" + row + b",\n" + small + b"]" if listed else small + b"\n" + row + b"\n" + small
    )
    row_begins = row[:1000]
    del row
    tracemalloc.start()
    raws = list(read_raw_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [raw.data for raw in raws] == [small, row_begins, small]
    assert raws[1].error is not None
    assert raws[1].error.message == f"the row has more than {LARGEST_ROW_BYTES:,} bytes"
    assert [raw.line for raw in raws] == [1, 2, 3]
    assert peak < 5 * LARGEST_ROW_BYTES


def test_d17_a_tail_of_nul_bytes_is_named_with_its_offset(path: Path) -> None:
    row = b'{"text": "a"}'
    for content, at in (
        (row + b"\n" + b"\0" * 5000, len(row) + 1),
        (row + b'\n{"text": "b' + b"\0" * 5000, len(row) + 12),
        (b"[" + row + b",\n" + b"\0" * 5000, len(row) + 3),
        (b"[" + row + b"]" + b"\0" * 5000, len(row) + 2),
    ):
        messages = _messages(path, content)
        assert messages[0] is None
        assert len(messages) == 2, content[:60]
        assert "NUL byte" in str(messages[1])
        assert f"byte {at} of the file" in str(messages[1])


def test_d17_a_sparse_tail_of_any_length_is_one_bad_row(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(40 << 20)
    found = list(read_raw_rows(path))
    assert len(found) == 2
    assert found[1].error is not None
    assert "NUL bytes from byte 14 of the file on" in found[1].error.message


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", []),
        (b" \n\n ", []),
        (b"[]", []),
        (b"[{}", ["1: the row does not end"]),
        (b"[{},", [None, "1: the list is not closed: the file was cut short"]),
        (b'[{}, {"a": "b', [None, "1: the row does not end"]),
        (b"[{},\n]", [None, "2: a row is missing before ']'"]),
        (b"[{}]\nx", [None, "2: text after the end of the list"]),
        (b'[{"a": }, {}]', ["1: not valid JSON", None]),
    ],
)
def test_broken_lists(path: Path, content: bytes, messages: list[str | None]) -> None:
    found = _messages(path, content)
    assert len(found) == len(messages)
    for seen, expected in zip(found, messages, strict=True):
        assert (seen is None) if expected is None else str(seen).startswith(expected)


def test_s5_no_device_and_no_directory(tmp_path: Path) -> None:
    for path, message in ((Path("/dev/null"), "not a regular file"), (tmp_path, "a dir"), (tmp_path / "no", "no such")):
        with pytest.raises(DataError, match=message):
            list(read_raw_rows(path))
