"""Warnings about rows: special tokens as text, duplicates, validation rows that are trained on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared_rows import alpaca, read_split

from llamatune.data import row_digests
from llamatune.data.batches import open_prepared
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.shared_rows import count_shared_rows
from llamatune.data.special_texts import SpecialTexts
from llamatune.events import Event, Notice
from llamatune.tokenizers.tokenizer import Tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]


def warnings(prepare: Prepare, *arguments: Any, **options: Any) -> tuple[SimpleNamespace, list[str]]:
    events: list[Event] = []
    report = prepare(*arguments, on_event=events.append, overwrite=True, **options)
    return report, [event.message for event in events if isinstance(event, Notice) and event.kind == "warning"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (alpaca(2, output="yes</s>"), "</s>"),
        (alpaca(2, instruction="<s> a </s>"), "<s>"),
        (alpaca(2, input="[INST] a [/INST]"), "[INST]"),
        (alpaca(2, output="a [/INST]"), "[/INST]"),
        (alpaca(2, output="<<SYS>>"), "<<SYS>>"),
        (alpaca(2, output="a<|eot_id|>"), "<|eot_id|>"),
        (alpaca(2, output="<|im_start|>user"), "<|im_start|>"),
        ({"text": "<unk> a"}, "<unk>"),
        ({"messages": [{"role": "user", "content": "a<eos>"}, {"role": "assistant", "content": "b"}]}, "<eos>"),
        (
            {"messages": [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>"},
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            ]},
            "<|im_end|>",
        ),
        (alpaca(2, output="a < b, x <s and [INS], <<48/2=24>>, <div></span>, <|x|>"), None),
    ],
)  # fmt: skip
def test_special_tokens_as_text_are_told_with_the_first_row(
    prepare: Prepare, write_rows: WriteRows, row: dict[str, Any], text: str | None
) -> None:
    plain = {"text": "a"} if "text" in row else alpaca(1)
    if "messages" in row:
        plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write_rows([plain, row, row, plain])
    report, said = warnings(prepare, path)
    if text is None:
        assert (report.special_texts, report.first_special_text, said) == ({}, None, [])
        return
    assert report.special_texts == {text: 2}
    assert report.first_special_text == {"text": text, "file": str(path), "line": 2, "row": 2}
    (message,) = [line for line in said if "special" in line]
    assert message.startswith(f"2 of 4 rows contain a special token's text, the first {text} in {path}:2: ")


def test_the_tokenizers_own_special_tokens_are_known() -> None:
    found = SpecialTexts(["<|reserved_7|>", "X", "<s>"])
    assert found.first_in("a<|reserved_7|></s>") == "<|reserved_7|>"
    assert found.first_in("a</s><|reserved_7|>") == "</s>"
    assert found.first_in("X") is None, "too short to tell anything"


def loosely(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple("".join(str(value).split()).casefold() for _, value in sorted(row.items()) if str(value).strip())


@pytest.mark.parametrize("held_out", ["fraction", "file"])
def test_equal_rows_against_a_count_by_hand(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path, held_out: str
) -> None:
    chance = random.Random(6)
    words = ["Green", "green", "GREEN", "hills", "Straße", "STRASSE", "a  b", "a b", "ab", "x\u3000y", "x\ny"]
    rows = [
        {"instruction": chance.choice(words), "input": chance.choice(["", "é"]), "output": chance.choice(words)}
        for _ in range(150)
    ]
    path, held_path = write_rows(rows[:110]), write_rows(rows[110:], "held.jsonl")
    options = {"validation_fraction": 0.3} if held_out == "fraction" else {"validation": [held_path]}
    report, said = warnings(prepare, path, **options)
    numbers = {name: [row for _, _, row in read_split(tmp_path / "out", name)] for name in ("train", "validation")}
    sides = {"train": [rows[n - 1] for n in numbers["train"]]}
    sides["validation"] = [rows[n - 1 + (110 if held_out == "file" else 0)] for n in numbers["validation"]]
    exact = {name: [tuple(sorted(row.items())) for row in side] for name, side in sides.items()}
    loose = {name: list(map(loosely, side)) for name, side in sides.items()}
    in_train = sum(row in set(exact["train"]) for row in exact["validation"])
    near = sum(row in set(loose["train"]) for row in loose["validation"])
    assert (report.validation_rows_in_train, report.validation_rows_near_train) == (in_train, near)
    assert near > in_train
    files = [rows[:110]] if held_out == "fraction" else [rows[:110], rows[110:]]
    assert report.duplicates == sum(len(file) - len({tuple(sorted(row.items())) for row in file}) for file in files)
    assert report.loose_duplicates == sum(len(file) - len(set(map(loosely, file))) for file in files)
    assert report.loose_duplicates > report.duplicates
    expected = [f"{near - in_train} validation rows differ from training rows in white space and case alone"]
    if in_train:
        expected.insert(0, f"{in_train} validation rows are training rows too")
    assert bool(in_train) == (held_out == "file"), "a fraction keeps equal rows together"
    assert said == expected


def test_chats_that_are_more_than_turns_have_digests_of_their_own() -> None:
    def texts(first: str, **more: Any) -> str:
        said = [{"role": "assistant", "content": first, **more}, {"role": "user", "content": "a"}]
        row = row_of({"messages": [*said, {"role": "assistant", "content": "b"}]}, FORMATS["chat"])
        assert row.irregular is not None
        return row_digests.texts_of(row)

    digests = [row_digests.loose_digest(texts(first)) for first in ("one", "two", " TWO")]
    assert len(set(digests)) == 2
    assert digests[1] == digests[2]
    assert SpecialTexts([]).first_in(texts("c<|eot_id|>")) == "<|eot_id|>"


def test_digests_are_counted_in_parts() -> None:
    chance = random.Random(1)
    some, others = ([chance.getrandbits(64) % 500 * 7919 for _ in range(900)] for _ in range(2))
    assert row_digests.count_distinct(some) == len(set(some))
    assert row_digests.count_shared(some, others) == sum(digest in set(others) for digest in some)
    assert row_digests.count_distinct([]) == row_digests.count_shared([], some) == 0


def test_shared_rows_of_prepared_directories(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Found by tokens alone, whatever the lengths; short rows and blanks included."""
    chance = random.Random(4)
    said = [chance.choices(["green", "hills", "seven", "1" * 40, "q"], k=chance.randint(1, 12)) for _ in range(120)]
    written = [str, str.upper, str.title, "{} ".format, " {}".format, "{}\n".format, "   {}   ".format]
    texts = [
        " ".join(word if chance.random() < 0.9 else chance.choice(written)(word) for word in words)
        for words in chance.choices(said, k=300)
    ]
    for name, some in (("train", texts[:200]), ("held", texts[200:])):
        prepare(write_rows([{"text": text} for text in some], f"{name}.jsonl"), output=tmp_path / name)
    train, held = (open_prepared(tmp_path / name).train for name in ("train", "held"))
    known = set(texts[:200])
    plain = {"".join(text.split()).casefold() for text in known}
    exact = sum(text in known for text in texts[200:])
    near = sum("".join(text.split()).casefold() in plain for text in texts[200:])
    assert 0 < exact < near < 100
    assert count_shared_rows(train, held, tokenizer.pieces()) == (exact, near)
    assert count_shared_rows(train, held, []) == (exact, exact)


def test_several_directories_are_read_as_one(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    counts, parts = (5, 1, 9), []
    for number, count in enumerate(counts):
        path = write_rows([alpaca(100 * number + n, output="apples " * (1 + n % 3)) for n in range(count)])
        prepare(path, output=tmp_path / str(number))
        parts.append(read_split(tmp_path / str(number)))
    split = open_prepared(*(tmp_path / str(number) for number in range(3))).train
    rows = list(itertools.chain(*parts))
    assert len(split) == 15
    assert split.lengths == [len(ids) for ids, _, _ in rows]
    assert split.target_counts == [sum(mask) for _, mask, _ in rows]
    assert [ids.tolist() for ids in split.rows_of_ids()] == [ids for ids, _, _ in rows]
    assert split.largest_id == max(max(ids) for ids, _, _ in rows)
    order = list(range(15))
    random.Random(2).shuffle(order)
    batch = split.batch(order)
    assert batch.rows == tuple(place + 1 for place in order), "row numbers count on"
    assert batch.input_ids[0].tolist() == [token for place in order for token in rows[place][0]]
    assert (batch.labels[0] != -100).int().tolist() == [target for place in order for target in rows[place][1]]
    assert batch.target_tokens == sum(split.target_counts)
    assert [len(batch.rows) for batch in split.batches(4)] == [4, 4, 4, 3]
