"""Windows of long texts: checked from the encoded document alone, not by the code that makes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared_rows import alpaca, read_split

from llamatune.errors import SpecError
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]
WORDS = ["apples", "green", "hills", "🦙", "é", "seven", "a", "\n", "stones", "7"]


def documents(count: int, longest: int) -> list[str]:
    chance = random.Random(count)
    return [f"{n} " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for n in range(count)]


def check(texts: list[str], tokenizer: Tokenizer, split: list[Any], most: int, stride: int) -> int:
    """Every token of every document is a target once, in order, behind what precedes it. Returns the windows."""
    bos, by_row = tokenizer.beginning, dict[int, list[tuple[list[int], list[int]]]]()
    for ids, mask, row in split:
        by_row.setdefault(row, []).append((ids, mask))
    assert [row for _, _, row in split] == sorted(row for _, _, row in split), "windows stand in order"
    for number, text in enumerate(texts, start=1):
        whole, windows = [*tokenizer.encode(text), tokenizer.eos_id], by_row[number]
        assert len(windows) == 1 or len(whole) > most
        trained = [token for ids, mask in windows for token, target in zip(ids, mask, strict=True) if target]
        assert trained == whole[1:], "all but the first token, which nothing predicts"
        done = 1
        for place, (ids, mask) in enumerate(windows):
            assert len(ids) <= most
            assert ids[: len(bos)] == bos
            context = mask.index(1)
            assert 0 not in mask[context:], "context comes first"
            # What is masked is what stands before in the document.
            assert ids[len(bos) :] == whole[done - (context - len(bos)) : done + sum(mask)]
            if place:
                alone = sum(mask) == 1 and place == len(windows) - 1
                wanted = max(stride, 0 if bos else 1)
                assert context - len(bos) == wanted or (alone and context - len(bos) > 0)
            if place < len(windows) - 1:
                assert len(ids) == most
                assert tokenizer.eos_id not in ids
            done += sum(mask)
        assert windows[-1][0][-1] == tokenizer.eos_id
    return len(split)


@pytest.mark.parametrize(("most", "stride"), [(16, 0), (16, 1), (16, 7), (16, 14), (3, 0), (40, 5)])
def test_each_token_is_a_target_once(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path, most: int, stride: int
) -> None:
    texts = documents(40, 60)
    report = prepare(
        write_rows([{"text": text} for text in texts]), overlong="split", stride=stride, max_seq_length=most
    )
    split = read_split(tmp_path / "out")
    assert check(texts, tokenizer, split, most, stride) == report.train_rows
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    cut = [length for length in lengths if length > most]
    assert (report.kept, report.truncated, report.split_rows) == (40, 0, len(cut))
    assert report.split_windows == report.train_rows - (40 - len(cut))
    assert report.repeated_tokens == report.tokens - sum(lengths) - (report.split_windows - len(cut))
    assert report.target_tokens == sum(length - 1 for length in lengths)


@pytest.mark.parametrize("name", ["llama_3", "smollm"])
def test_other_tokenizers_with_bos_and_without(
    prepare: Prepare, write_rows: WriteRows, json_tokenizers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    texts, tokenizer = documents(20, 60), load_tokenizer(json_tokenizers[name])
    for stride in (0, 4):
        prepare(
            write_rows([{"text": text} for text in texts]), overlong="split", stride=stride, max_seq_length=16,
            tokenizer=json_tokenizers[name], output=tmp_path / str(stride),
        )  # fmt: skip
        assert check(texts, tokenizer, read_split(tmp_path / str(stride)), 16, stride) > 40


def test_the_eos_never_stands_alone_behind_a_bos(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "green hills and seven stones"
    most = len(tokenizer.encode(text))  # BOS and all of it: the EOS is one token too many
    report = prepare(write_rows([{"text": text}]), overlong="split", max_seq_length=most)
    (_, _, _), (ids, mask, _) = read_split(tmp_path / "out")
    assert (len(ids), mask) == (most, [0] * (most - 1) + [1])
    assert (report.split_windows, report.repeated_tokens) == (2, most - 2)


def test_windows_are_those_of_the_tokenizers_library(
    prepare: Prepare, write_rows: WriteRows, json_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """Its truncation with a stride, BOS at the beginning of each window; it puts no EOS, so the last one differs."""
    from tokenizers import Tokenizer as Library

    directory, text = json_tokenizers["llama_3"], documents(1, 300)[0]
    prepare(write_rows([{"text": text}]), overlong="split", stride=5, max_seq_length=20, tokenizer=directory)
    library = Library.from_file(str(directory / "tokenizer.json"))
    library.enable_truncation(20, stride=5)
    encoded = library.encode(text)
    theirs = [part.ids for part in (encoded, *encoded.overflowing)]
    ours = [ids for ids, _, _ in read_split(tmp_path / "out")]
    assert len(ours) > 5
    assert ours[:-1] == theirs[: len(ours) - 1]


def test_windows_of_a_document_stay_together(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    """On one side of the validation split, chosen together by a weight, and counted as one row."""
    texts = documents(30, 60)
    path = write_rows([{"text": text} for text in [*texts, texts[0]]])
    report = prepare(path, overlong="split", max_seq_length=16, validation_fraction=0.3)
    sides = [{row for _, _, row in read_split(tmp_path / "out", split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(1, 32))
    assert (report.duplicates, report.loose_duplicates) == (1, 1)
    whole = prepare(path, overlong="split", max_seq_length=16, output=tmp_path / "whole")
    half = prepare(Path(f"{path}:1.5"), overlong="split", max_seq_length=16, output=tmp_path / "half")
    rows = [row for _, _, row in read_split(tmp_path / "half")]
    again = rows[whole.train_rows :]
    assert len(set(again)) == 16, "half of 31 documents, each with all of its windows"
    assert sorted(again) == sorted(row for row in rows[: whole.train_rows] if row in again)
    assert half.train_rows == len(rows)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([alpaca(1)], {}, "--overlong split is for text rows, and these are alpaca rows"),
        ([{"text": "a"}], {"stride": 15, "max_seq_length": 16}, "it must be below 15"),
        ([{"text": "a"}], {"max_seq_length": 2}, "--max-seq-length has no room for windows"),
        ([{"text": "a"}], {"overlong": "truncate", "stride": 3}, "--stride is for --overlong split"),
    ],
)
def test_what_cannot_be_split_is_refused(
    prepare: Prepare, write_rows: WriteRows, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as refused:
        prepare(write_rows(rows), **{"overlong": "split", **options})
    assert message in str(refused.value)


def test_short_texts_give_the_bytes_that_they_gave(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([{"text": text} for text in documents(9, 8)])
    for policy in ("truncate", "split"):
        prepare(path, overlong=policy, output=tmp_path / policy)
    assert len({(tmp_path / policy / "train.safetensors").read_bytes() for policy in ("truncate", "split")}) == 1
