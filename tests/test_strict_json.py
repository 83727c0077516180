"""Strict JSON."""

import json
import re
import time
from pathlib import Path

import pytest

from llamatune.errors import CheckpointError, SpecError
from llamatune.strict_json import parse_json, read_json
from llamatune.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "1" * 6000,
        '"\\ud800"',
        "",
        "{",
        b"\xff",
        '{"a": Infinity}',
        "[1e999]",
        "-1e309",
    ],
)
def test_json_that_others_accept_and_we_do_not(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any ValueError is the contract
        parse_json(text)


def test_a_json_file_must_hold_an_object(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_json(tmp_path / "list.json")


def test_a_key_that_comes_twice_is_found_at_once_among_many() -> None:
    text = json.dumps({f"{n}{'x' * 90}": n for n in range(30_000)})
    begin = time.process_time()
    with pytest.raises(ValueError, match=f"the key '29999{'x' * 75}' appears twice"):
        parse_json(text[:-1] + f', "29999{"x" * 90}": 1}}')
    assert time.process_time() - begin < 2


BROKEN = [
    *(b"\xff\xfe{", b'{"a": "\xc3"}', b"", b"{", b'{"a" 1}', b'{"a": 1 "b": 2}', b"{'a': 1}", b'{"a": 1,}', b"[1,]"),
    *(b'"open', b'"\x01"', b'"\\x"', b'"\\u12"', b"1 2", b"1" * 5000, b"[" * 100_000, b'"\\ud800"', b"NaN", b"1e999"),
    *(b"nul", b'{"a": 1', b"\xef\xbb\xbf\xef\xbb\xbf1", b"[1 2]", b"-"),
]
LIBRARY_WORDS = re.compile(
    r"codec|delimiter|Expecting|char \d|Extra data|Unterminated|Invalid|sys\.|\(unicode|limit \(|utf-8'"
)


@pytest.mark.parametrize("content", BROKEN, ids=[str(content[:12]) for content in BROKEN])
def test_why_a_file_is_no_json_is_said_in_plain_words(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert str(caught.value).startswith("not valid JSON: ")
    assert str(caught.value).endswith(str(file))
    assert not LIBRARY_WORDS.search(str(caught.value)), str(caught.value)


def test_a_fault_of_json_has_its_place(tmp_path: Path) -> None:
    for content, place in (
        (b'{"a": 1,\n "b" 2}', "a colon is expected at line 2, column 6"),
        (b'{"\xe9"}', "UTF-8 at byte 2"),
    ):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=place):
            read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: c", "a colon where none may be; texts that hold one need quotes (line 1)"),
        ("a: 1\n b: 2", "a colon where none may be; texts that hold one need quotes (line 2)"),
        ("a: @x", "'@' where none may be; texts that begin with it need quotes (line 1)"),
        ("a:\n\t- 1", "'\\t' where none may be; texts that begin with it need quotes (line 2)"),
        ("a: 'open", "a text in quotes that does not end (line 1)"),
        ('a: "\\q"', "the unknown escape 'q' within double quotes (line 1)"),
        ("a: [1", "a comma or ] is expected (line 1)"),
        ("a: {b: 1", "a comma or } is expected (line 1)"),
        ("a:\n  b: 1\n c: 2", "it is indented otherwise than the lines before (line 3)"),
        ("a: 1\n- b", "it is indented otherwise than the lines before (line 2)"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a\nb: 1", "a colon where none may be; texts that hold one need quotes (line 2)"),
        ("a: 1\nb\n", "a key without a colon behind it (line 3)"),
        ("a: \x07", "the character U+0007 (line 1)"),
        (f"a: {'1' * 5000}", "a whole number of thousands of digits"),
        ('a: "\\U00110000"', "an escape of no character"),
        ('a: "\\UFFFFFFFF"', "an escape of no character"),
        ("a: 1\na: 2", "the key 'a' appears twice (line 2)"),
    ],
)
def test_why_a_file_is_no_yaml_is_said_in_plain_words(text: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith(f"not valid YAML: {told}")


def test_every_sentence_of_pyyaml_has_plain_words() -> None:
    """Of its scanner and parser, which see any text; what composes and constructs is ours."""
    import inspect

    from yaml import parser, scanner

    from llamatune.strict_yaml import _plain

    source = inspect.getsource(scanner) + inspect.getsource(parser)
    said = re.findall(r'"((?:found|expected|could|mapping|sequence)[^"]*)"', source)
    assert len(said) > 30
    formats = [re.sub(r"%r", "'x'", re.sub(r"%d", "2", sentence)) for sentence in said]
    of_tags = (
        "version",
        "found undefined tag handle",
        "found non-specific tag",
        "found duplicate",
        "found incompatible",
    )
    left = [one for one in formats if _plain(one) == one and not one.startswith(of_tags)]
    assert left == []
