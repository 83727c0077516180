"""Several files of rows: weights, other formats beside each other, counts by file."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared_rows import alpaca, read_split

from llamatune.command_options.row_input import RowInput, row_input
from llamatune.errors import DataError, SpecError
from llamatune.events import Event, Notice

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]


def weighted(path: Path, weight: object) -> Path:
    return Path(f"{path}:{weight}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("a.jsonl", 1.0)), ("a.jsonl:0.5", ("a.jsonl", 0.5)), ("a.jsonl:2", ("a.jsonl", 2.0)),
        ("a.jsonl:.25", ("a.jsonl", 0.25)), ("a.jsonl:1e-2", ("a.jsonl", 0.01)), ("a:1:2", ("a:1", 2.0)),
        ("real:0.5", ("real:0.5", 1.0)), ("real:0.5:3", ("real:0.5", 3.0)), ("real:0.50", ("real", 0.5)),
        ("a.jsonl:x", ("a.jsonl:x", 1.0)), ("a.jsonl:", ("a.jsonl:", 1.0)), ("-:0.5", ("-", 0.5)),
        ("a.jsonl:nan", ("a.jsonl:nan", 1.0)),
    ],
)  # fmt: skip
def test_a_weight_is_what_stands_behind_the_last_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, float]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("real:0.5").touch()
    assert row_input(Path(name)) == RowInput(Path(expected[0]), expected[1])


@pytest.mark.parametrize("weight", ["0", "-1", "1000.5", "0.0", "1e9"])
def test_weights_out_of_bounds_are_refused(weight: str) -> None:
    with pytest.raises(SpecError, match=r"the weight of rows\.jsonl is .*: it must be above 0 and at most 1,000"):
        row_input(Path(f"rows.jsonl:{weight}"))


def test_weights_against_a_count_by_hand(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    """Whatever the weights, sizes, seeds: each row as often as its weight says, once before any comes again."""
    chance, sides = random.Random(5), Counter[str]()
    for case in range(12):
        weights = [chance.choice([0.01, 0.3, 0.5, 1, 1.5, 2, 2.25]) for _ in range(chance.randint(1, 3))]
        sizes = [chance.randint(1, 30) for _ in weights]
        files, start = list[Path](), 0
        for number, size in enumerate(sizes):
            rows = [alpaca(1000 * case + start + n) for n in range(size)]
            start += size
            files.append(weighted(write_rows(rows, f"{case}-{number}.jsonl"), weights[number]))
        fraction, seed = chance.choice([0.0, 0.2]), chance.randint(0, 3)
        options = {"validation_fraction": fraction, "seed": seed}
        report = prepare(files, output=tmp_path / f"out{case}", **options)
        written = [row for _, _, row in read_split(tmp_path / f"out{case}")]
        held = (
            [row for _, _, row in read_split(tmp_path / f"out{case}", "validation")]
            if fraction and (report.validation_rows)
            else []
        )
        assert len(set(held)) == len(held)
        assert not set(held) & set(written)
        counts, first = Counter(written), 1
        for weight, size, facts in zip(weights, sizes, report.files, strict=True):
            numbers = range(first, first + size)
            whole, extra = math.floor(weight), round((weight % 1) * size)
            extra = max(extra, 1) if not whole else extra
            times = Counter(counts[number] for number in numbers if number not in held)
            sides.update({"held": sum(number in held for number in numbers), "trained": len(numbers)})
            assert set(times) <= {whole, whole + 1}
            more = sum(n for count, n in times.items() if count == whole + 1)
            assert more <= extra <= more + sum(number in held for number in numbers)
            assert facts["train_rows"] == sum(counts[number] for number in numbers)
            assert facts["validation_rows"] == sum(number in held for number in numbers)
            assert (facts["weight"], facts["rows_in"], facts["kept"]) == (weight, size, size)
            first += size
        before = [sum(row == other for other in written[:place]) for place, row in enumerate(written)]
        assert before == sorted(before), "every row comes once before any comes again"
        assert report.train_rows == len(written) == sum(file["train_rows"] for file in report.files)
        assert report.duplicates == 0, "a weight makes no duplicates"
    assert sides["held"] > 5


def test_a_weight_is_a_function_of_the_seed(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = write_rows([alpaca(n) for n in range(40)])

    def chosen(weight: float, seed: int) -> list[int]:
        output = tmp_path / f"{weight}-{seed}"
        prepare(weighted(rows, weight), seed=seed, output=output)
        return [row for _, _, row in read_split(output)]

    half, other = chosen(0.5, 1), chosen(0.5, 2)
    assert half == sorted(half)
    assert half != other
    assert set(chosen(0.25, 1)) < set(half), "a larger share contains a smaller one"
    assert prepare(weighted(rows, 0.5), seed=1, output=tmp_path / "0.5-1").unchanged
    again = chosen(1.5, 1)
    assert (again[:40], again[40:]) == (list(range(1, 41)), half)
    # A whole weight asks nothing of the seed, and 1 is the same product as no weight.
    prepare(weighted(rows, 2), output=tmp_path / "twice")
    assert prepare(weighted(rows, 2), seed=9, output=tmp_path / "twice").unchanged
    prepare(rows, output=tmp_path / "plain")
    assert prepare(weighted(rows, 1), output=tmp_path / "plain").unchanged
    with pytest.raises(SpecError, match=r"validation rows have no weight.*write --validation"):
        prepare(rows, validation=[weighted(rows, 0.5)], output=tmp_path / "held")


def test_rows_of_several_formats(
    prepare: Prepare, write_rows: WriteRows, command: Callable[..., Any], tmp_path: Path,
    tokenizer_models: dict[str, Path],
) -> None:  # fmt: skip
    """Each file's rows are those that it has alone; text first, the prompts' template is stored all the same."""
    said = [{"role": "user", "content": "seven"}, {"role": "assistant", "content": "stone"}]
    kinds: dict[str, list[Any]] = {
        "text": [{"text": "green hills"}, {"text": "old stones"}],
        "alpaca": [alpaca(1), alpaca(2)],
        "chat": [{"messages": said}],
        "gsm8k": [{"question": "1+1?", "answer": "<<1+1=2>>2"}],
    }
    files = {name: write_rows(rows, f"{name}.jsonl") for name, rows in kinds.items()}
    expected = list[tuple[list[int], list[int]]]()
    for name, path in files.items():
        prepare(path, output=tmp_path / name, gsm8k_annotations="strip")
        expected += [(ids, mask) for ids, mask, _ in read_split(tmp_path / name)]
    notices: list[Event] = []
    report = prepare(list(files.values()), gsm8k_annotations="strip", on_event=notices.append)
    assert [(ids, mask) for ids, mask, _ in read_split(tmp_path / "out")] == expected
    assert [row for _, _, row in read_split(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert (report.format, report.template["name"]) == ("text, alpaca, chat, gsm8k", "alpaca")
    assert [(file["format"], file["train_rows"]) for file in report.files] == [
        ("text", 2), ("alpaca", 2), ("chat", 1), ("gsm8k", 1)
    ]  # fmt: skip
    (said_of,) = [event.message for event in notices if isinstance(event, Notice) and "several" in event.message]
    assert said_of.startswith("rows of several formats: text (text.jsonl), alpaca (alpaca.jsonl), chat (chat.jsonl)")
    assert not any("no effect" in event.message for event in notices if isinstance(event, Notice))
    assert prepare(list(files.values()), gsm8k_annotations="strip").unchanged
    # A template is for those that have prompts, and must fit each of them.
    with pytest.raises(SpecError, match="which gsm8k rows lack"):
        prepare([files["text"], files["gsm8k"]], template="alpaca", output=tmp_path / "third")
    done = command(
        "prepare-data", f"{files['alpaca']}:0.5", files["text"], "--tokenizer", tokenizer_models["bpe"], "--output",
        tmp_path / "told", "--json",
    )  # fmt: skip
    assert done.code == 0
    assert [file["train_rows"] for file in json.loads(done.stdout)["files"]] == [1, 2]
    shown = command(
        "prepare-data", f"{files['alpaca']}:0.5", files["text"], "--tokenizer", tokenizer_models["bpe"], "--output",
        tmp_path / "told",
    ).stdout  # fmt: skip
    assert "weight 0.5, 1 in train, 0 in validation" in " ".join(shown.split())


def test_a_limit_counts_over_files_of_several_formats(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    first, second = write_rows([alpaca(1), alpaca(2)]), write_rows([{"text": "a"}, "{broken"], "second.jsonl")
    report = prepare([first, second], limit=3)
    assert ([file["rows_in"] for file in report.files], report.kept) == ([2, 1], 3)
    with pytest.raises(DataError, match=r"second\.jsonl:2: "):
        prepare([first, second], output=tmp_path / "other")


@pytest.mark.slow
def test_workers_change_no_byte_of_several_files(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    files = [
        weighted(write_rows([alpaca(n) for n in range(600)]), 1.5),
        write_rows([{"text": f"green {n}"} for n in range(300)], "second.jsonl"),
        weighted(write_rows([alpaca(n) for n in range(900, 1300)], "third.jsonl"), 0.5),
    ]
    for workers in (0, 2):
        prepare(files, workers=workers, output=tmp_path / str(workers), validation_fraction=0.1)
    for name in ("train.safetensors", "validation.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
