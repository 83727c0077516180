"""Strict JSON."""

import json
import time
from pathlib import Path

import pytest

from llamatune.errors import CheckpointError
from llamatune.strict_json import parse_json, read_json


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
