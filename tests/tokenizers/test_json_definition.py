"""What a ``tokenizer.json`` may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamatune.errors import CheckpointError
from llamatune.tokenizers.json_definition import pattern_fault
from llamatune.tokenizers.loading import load_tokenizer


@pytest.mark.parametrize(
    "content", ["null", "[]", "[1]", '"text"', "7", '{"model": ' + "[" * 9000, "{}", '{"model": {}}']
)
def test_files_that_hold_no_definition_are_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"JSON|decoder") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_wordpiece_is_refused_by_name(json_tokenizers: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="WordPiece"):
        load_tokenizer(json_tokenizers["wordpiece"])


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+", False),
        (r" ?[^(\s|[.,!?…\u3002\uff0c])]+", False),
        (r"(?:\p{L}|\d)+", False),
        (r"(a+)+", True),
        (r"((a|b*)c?)*", True),
        (r"(?:a{1,9})+", True),
        (r"([a+]|\+)+", False),
        (r"(a)\1", True),
        (r"(?<x>a)\g<x>", True),
        ("a" * 4001, True),
    ],
)
def test_patterns_of_exponential_time_are_found(pattern: str, refused: bool) -> None:
    assert (pattern_fault(pattern) is not None) is refused
