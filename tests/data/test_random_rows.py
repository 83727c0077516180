"""Random files through the command line: documented ends, and no row and no text that is lost without being counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from prepared_rows import read_split
from random_rows import Rows, words

Command = Callable[..., Any]
OPTIONS: list[tuple[object, ...]] = [
    (), (), (), ("--train-on", "last-assistant"), ("--train-on-prompt",), ("--template", "llama2-chat"),
    ("--validation-fraction", 0.3), ("--limit", 7), ("--template", "alpaca"), ("--gsm8k-annotations", "strip"),
    ("--preview", 2), ("--max-seq-length", 24, "--overlong", "drop"), ("--max-seq-length", 16),
]  # fmt: skip
CHATS = ("messages", "conversations")
FORMATS = ["auto", "auto", "alpaca", "gsm8k", "chat", "completion", "text"]


def prepare(command: Command, content: bytes, directory: Path, *options: object) -> Any:
    """The report, or None where there was an error that the documentation knows."""
    path = directory / "rows.jsonl"
    path.write_bytes(content)
    outcome = command("prepare-data", path, "--output", directory / "out", "--overwrite", "--json", *options)
    assert outcome.code in (0, 2, 3), (outcome, content)
    assert "Traceback" not in outcome.stderr, (outcome, content)
    if outcome.code:
        (fault,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert outcome.stderr.splitlines()[-1] == fault, (outcome, content)
        return None
    return json.loads(outcome.stdout)


def attack(command: Command, tokenizer: Path, directory: Path, seed: int) -> str:
    """One random file with random options: every row is counted once, and what a kept row had is there or counted."""
    chance = random.Random(seed)
    made = Rows(chance)
    lines = [made.line() for _ in range(chance.randint(1, 25))]
    ends = chance.choice([b"\n", b"\r\n"])
    options = (*chance.choice(OPTIONS), "--format", chance.choice(FORMATS), "--skip-bad-rows", 99)
    content = chance.choice([b"", b"", b"\xef\xbb\xbf"]) + ends.join(lines)
    report = prepare(command, content, directory, "--tokenizer", tokenizer, *options)
    if report is None:
        return "refused"
    assert report["rows_in"] == report["kept"] + report["dropped"] + report["refused"], seed
    assert report["train_rows"] + report["validation_rows"] == report["kept"], seed
    refused = directory / "out" / "refused.jsonl"
    left_out = refused.read_text().splitlines() if refused.exists() else []
    assert len(left_out) == report["refused"] == sum(report["refused_reasons"].values()), seed
    assert report["dropped"] == sum(report["dropped_reasons"].values()), seed
    given = [line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    assert "--limit" in options or report["rows_in"] == len(given), seed
    if not report["truncated"]:
        lost = lost_texts(report, given, tokenizer, directory)
        counted, left_out = report["ignored_keys"], (report.get("adjusted") or {}).get("trailing_turns", 0)
        for key, count in lost.items():
            outer = key.partition("[]")[0]
            known = counted.get(key, 0) + counted.get(outer, 0) + left_out * (outer in CHATS)
            assert known >= count, (seed, options, key, counted)
    return "kept"


def lost_texts(report: Any, rows: list[bytes], tokenizer: Path, directory: Path) -> Counter[str]:
    """How many kept rows have a text, by its key, that is not in their ids."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    lost = Counter[str]()
    splits = [name for name in ("train", "validation") if report[f"{name}_rows"]]
    for ids, _, number in (row for name in splits for row in read_split(directory / "out", name)):
        text = library.decode(ids)
        missing = {path for path, word in words(json.loads(rows[number - 1])) if word not in text}
        lost.update({f"{path[0]}[].{path[1]}" if len(path) > 1 else path[0] for path in missing})
    return lost


def test_random_files(command: Command, tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    ends = Counter(attack(command, tokenizer_models["bpe"], tmp_path, seed) for seed in range(40))
    assert min(ends["kept"], ends["refused"]) > 5


@pytest.mark.slow
def test_thousands_of_random_files(command: Command, tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(1000, 5000):
        attack(command, tokenizer_models["bpe"], tmp_path, seed)
