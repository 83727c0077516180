from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared_rows import alpaca, read_split

from llamatune.data.preview import preview_rows
from llamatune.data.templates import TEMPLATES
from llamatune.errors import CheckpointError, DataError, EnvironmentFault, LlamatuneError, SpecError, Stopped
from llamatune.events import Event, Notice, Progress
from llamatune.safe_reading import digest_file
from llamatune.strict_json import read_json
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]


def _tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def _refused(prepare: Prepare, *arguments: Any, error: type[LlamatuneError] = DataError, **options: Any) -> str:
    """The message of a preparation that must fail and leave nothing behind."""
    with pytest.raises(error) as caught:
        prepare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_row_is_bos_prompt_completion_eos(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = prepare(write_rows([alpaca(1), alpaca(2, input="green hills")]))
    assert (report.rows_in, report.kept, report.train_rows, report.validation_rows) == (2, 2, 2, 0)
    for number, (ids, mask, row) in enumerate(read_split(tmp_path / "out"), start=1):
        assert row == number
        fields = {"instruction": f"Count {number} apples", "input": "green hills" if number == 2 else ""}
        prompt = TEMPLATES["alpaca"].prompt_of(fields)
        assert ids == [*tokenizer.encode(prompt + f"There are {number}."), tokenizer.eos_id]
        trained = [i for i, target in zip(ids, mask, strict=True) if target]
        assert tokenizer.decode(trained) == f"There are {number}."
        assert mask == sorted(mask)
    assert report.tokens == sum(len(ids) for ids, _, _ in read_split(tmp_path / "out"))
    assert report.target_tokens == sum(sum(mask) for _, mask, _ in read_split(tmp_path / "out"))


def test_the_manifest_tells_how_it_was_made(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(write_rows([alpaca(n) for n in range(10)]), validation_fraction=0.3)
    manifest = read_json(tmp_path / "out" / "llamatune.json")
    facts = manifest["facts"]
    assert manifest["kind"] == "prepared"
    assert set(manifest["files"]) == {"train.safetensors", "validation.safetensors"}
    assert facts["template"] == TEMPLATES["alpaca"].to_dict()
    assert facts["tokenizer"] == {
        "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "bos_id": 1, "eos_id": 2
    }  # fmt: skip
    assert facts["format"] == "alpaca"
    assert facts["max_seq_length"] == 512
    assert facts["splits"]["validation"]["rows"] == facts["validation_rows"] == 3


def test_d1_bad_rows_are_all_counted_and_nothing_is_written(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [alpaca(n) for n in range(16)] + [
        {"instruction": "a", "input": ""},
        alpaca(17, output=""),
        "{broken",
        alpaca(19),
    ]
    path = write_rows(rows)
    message = _refused(prepare, path)
    assert message.startswith(f"{path}:17: no field 'output'; the row has 'instruction', 'input'")
    assert "3 bad rows of 20" in message
    assert "--skip-bad-rows 3" in message
    assert DataError.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    assert _refused(prepare, path, skip_bad_rows=2) == message


def test_d1_bad_rows_can_be_refused_and_are_saved(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([alpaca(1), {"instruction": "a"}, "[1]", alpaca(4)])
    report = prepare(path, skip_bad_rows=2)
    assert (report.rows_in, report.kept, report.dropped, report.refused) == (4, 2, 0, 2)
    assert report.refused_reasons == {"missing_field": 1, "not_an_object": 1}
    assert [row for _, _, row in read_split(tmp_path / "out")] == [1, 4]
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [(str(path), 2), (str(path), 3)]
    assert lines[0]["reason"] == "no field 'output'; the row has 'instruction'"
    # The stricter command must not take the laxer one's product for its own.
    with pytest.raises(EnvironmentFault):
        prepare(path)


def test_d2_how_the_file_is_written_alters_no_token(prepare: Prepare, tmp_path: Path) -> None:
    lines = [json.dumps(alpaca(n)) for n in range(3)]
    variants = ["\n".join(lines) + "\n", "\ufeff" + "\r\n\r\n".join(lines), "[" + ",\n".join(lines) + "]"]
    products = []
    for number, text in enumerate(variants):
        path = tmp_path / f"rows{number}.json"
        path.write_bytes(text.encode())
        prepare(path, output=tmp_path / f"out{number}")
        products.append((tmp_path / f"out{number}" / "train.safetensors").read_bytes())
    assert products[0] == products[1] == products[2]


def test_rows_of_a_list_on_one_line_are_named_by_their_number(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [alpaca(n) for n in range(1, 300)]
    rows[200] = alpaca(201, output="seven stone " * 40)
    path.write_text(json.dumps(rows))
    assert prepare(path).longest_rows[0].items() >= {"file": str(path), "line": 1, "row": 201}.items()
    message = _refused(prepare, path, max_seq_length=99, overlong="error", overwrite=True)
    assert message.startswith(f"{path}: row 201: the row has ")
    rows[120] = {"instruction": "a"}
    path.write_text(json.dumps(rows))
    assert _refused(prepare, path, overwrite=True).startswith(f"{path}: row 121: no field 'output'")
    prepare(path, skip_bad_rows=1, overwrite=True)
    refused = json.loads((tmp_path / "out" / "refused.jsonl").read_text())
    assert (refused["line"], refused["row"]) == (1, 121)


def test_d2_utf_16_and_latin_1_are_named(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(alpaca(1)) + "\n").encode("utf-16"))
    assert f"UTF-16 text (at byte 0), not UTF-8: {path}:1" in _refused(prepare, path)
    path.write_bytes((json.dumps(alpaca(1, output="café"), ensure_ascii=False) + "\n").encode("latin-1"))
    message = _refused(prepare, path)
    assert f"{path}:1: byte 0xe9 at byte 61 of the file is not UTF-8" in message


def test_d3_line_separators_of_other_kinds_stay_in_the_row(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = prepare(write_rows([alpaca(1, output="a\u2028b\u0085c")]))
    assert report.rows_in == 1
    ids, _, _ = read_split(tmp_path / "out")[0]
    assert tokenizer.decode(ids).endswith("a\u2028b\u0085c")


def test_d4_surrogates_and_nul_characters(prepare: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([alpaca(1), '{"instruction": "a", "output": "\\ud83d"}'])
    assert f"{path}:2: a lone surrogate, which is no character, in field 'output'" in _refused(prepare, path)
    path = write_rows([alpaca(1), '{"instruction": "a\\u0000", "output": "b"}'])
    assert f"{path}:2: a NUL character in field 'instruction'" in _refused(prepare, path)


def test_d5_huge_and_deeply_nested_rows(prepare: Prepare, write_rows: WriteRows) -> None:
    for row, message in (
        (alpaca(2, output="x" * 24_000_000), "the row has more than 2,097,152 bytes"),
        ('{"instruction": ' + "[" * 100_000, "nested too deeply"),
        ('{"instruction": ' + "7" * 5000 + "}", "a whole number of thousands of digits"),
    ):
        path = write_rows([alpaca(1), row, alpaca(3)])
        assert f"{path}:2: " in (found := _refused(prepare, path))
        assert message in found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 usable rows of 0"),
        (["", "  "], "0 usable rows of 0"),
        (["{broken", "[1]"], "0 usable rows of 2"),
        ([{"instruction": "a"}], "0 usable rows of 1"),
    ],
)
def test_d6_nothing_to_train_on(prepare: Prepare, write_rows: WriteRows, rows: list[Any], message: str) -> None:
    assert message in _refused(prepare, write_rows(rows))
    assert message in _refused(prepare, write_rows(rows), skip_bad_rows=9)


def test_d6_one_row_is_enough(prepare: Prepare, write_rows: WriteRows) -> None:
    notices: list[Event] = []
    report = prepare(write_rows([alpaca(1)]), validation_fraction=0.5, on_event=notices.append)
    assert (report.train_rows, report.validation_rows) == (1, 0)
    assert any(isinstance(notice, Notice) and notice.kind == "warning" for notice in notices)


def test_d7_rows_without_a_target_are_dropped_and_counted(prepare: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([alpaca(1), alpaca(2, instruction="apples " * 300), alpaca(3)])
    report = prepare(path, max_seq_length=128)
    assert (report.rows_in, report.kept, report.dropped, report.refused) == (3, 2, 1, 0)
    assert report.dropped_reasons == {"no_target_tokens": 1}
    assert report.truncated == 0
    assert report.longest_rows[0]["line"] == 2
    assert report.longest_rows[0]["tokens"] > 300
    message = _refused(prepare, path, max_seq_length=16, overwrite=True)
    assert "0 usable rows of 3" in message
    assert "3 no_target_tokens" in message
    assert "--max-seq-length" in message


def test_d8_truncation_is_counted_and_takes_the_eos(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows([alpaca(1), alpaca(2, output="seven stone " * 100)])
    report = prepare(path, max_seq_length=100)
    whole, cut = read_split(tmp_path / "out")
    assert whole[0].count(tokenizer.eos_id) == 1
    assert len(cut[0]) == 100
    assert tokenizer.eos_id not in cut[0]
    assert sum(cut[1]) > 0
    full = report.longest_rows[0]["tokens"]
    assert (report.truncated, report.truncated_tokens) == (1, full - 100)
    dropped = prepare(path, max_seq_length=100, overlong="drop", output=tmp_path / "other")
    assert (dropped.kept, dropped.dropped_reasons, dropped.truncated) == (1, {"overlong": 1}, 0)
    message = _refused(prepare, path, max_seq_length=100, overlong="error", output=tmp_path / "third")
    assert f"{path}:2: the row has {full} tokens, more than --max-seq-length 100" in message
    exact = prepare(path, max_seq_length=full, overlong="error", output=tmp_path / "fourth")
    assert exact.truncated == 0


def test_d9_d10_eos_is_trained_once_by_id(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(write_rows([alpaca(n) for n in range(20)]))
    for ids, mask, _ in read_split(tmp_path / "out"):
        assert [i for i, token in enumerate(ids) if token == tokenizer.eos_id] == [len(ids) - 1]
        assert mask[-1] == 1


def test_d11_d13_control_strings_are_plain_text_and_bos_comes_once(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(write_rows([alpaca(1, instruction="<s></s> [INST] <unk>", output="a</s><s>b")]))
    ((ids, mask, _),) = read_split(tmp_path / "out")
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == 1
    assert mask[0] == 0
    assert tokenizer.decode(ids).endswith("a</s><s>b")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_d12_the_mask_starts_at_the_completions_first_character(
    prepare: Prepare, write_rows: WriteRows, tokenizer_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    chance = random.Random(3)
    alphabet = ["a", "in", " ", "\n", ":", "é", "🦙", "apples", "7"]
    pairs = [
        ("x" + "".join(chance.choices(alphabet, k=5)), "".join(chance.choices(alphabet, k=4)) + "y") for _ in range(200)
    ]
    prepare(write_rows([{"prompt": p, "completion": c} for p, c in pairs]), tokenizer=tokenizer_models[kind])
    tokenizer = load_tokenizer(tokenizer_models[kind])
    for ids, mask, row in read_split(tmp_path / "out"):
        prompt, completion = pairs[row - 1]
        first, kept = mask.index(1), prompt.rstrip(" ")
        moved = prompt[len(kept) :]
        assert ids[:first] == tokenizer.encode(kept)
        assert _bytes_of(tokenizer, ids[1:first]) == f" {kept}".encode()
        assert _bytes_of(tokenizer, ids[first:-1]) == f"{moved}{completion}".encode()
        assert ids[-1] == tokenizer.eos_id


def _bytes_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    pieces = [tokenizer.piece(i) for i in ids]
    return b"".join(
        bytes([int(piece[3:5], 16)]) if tokenizer._processor.is_byte(i) else piece.replace("▁", " ").encode()
        for i, piece in zip(ids, pieces, strict=True)
    )


def test_d15_equal_rows_fall_on_the_same_side_in_file_order(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [alpaca(n % 40) for n in range(100)]
    path = write_rows([json.dumps(row, indent=None if n % 2 else 1).replace("\n", "") for n, row in enumerate(rows)])
    seen = set()
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        report = prepare(path, validation_fraction=0.2, seed=seed, output=out)
        train = [row for _, _, row in read_split(out)]
        held = [row for _, _, row in read_split(out, "validation")]
        assert report.duplicates == 60
        assert train == sorted(train)
        assert held == sorted(held)
        assert sorted(train + held) == list(range(1, 101))
        assert {(row - 1) % 40 for row in train}.isdisjoint((row - 1) % 40 for row in held)
        assert 17 <= len(held) <= 20
        seen.add(tuple(held))
    assert len(seen) > 1, "the seed decides"


def test_d15_a_given_validation_file_that_repeats_training_rows_warns(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    notices: list[Event] = []
    train = write_rows([alpaca(n) for n in range(5)])
    held = write_rows([alpaca(n) for n in range(3, 8)], "held.jsonl")
    report = prepare(train, validation=[held], on_event=notices.append)
    assert (report.rows_in, report.train_rows, report.validation_rows) == (10, 5, 5)
    assert report.validation_rows_in_train == 2
    assert Notice("2 validation rows are training rows too", "warning") in notices
    assert [row for _, _, row in read_split(tmp_path / "out", "validation")] == [1, 2, 3, 4, 5]


def test_d16_misspelt_and_extra_keys(prepare: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([alpaca(1), {"instruction": "a", "outptu": "b"}])
    assert f"{path}:2: unknown field 'outptu', did you mean 'output'?" in _refused(prepare, path)
    path = write_rows([alpaca(1), '{"instruction": "a", "output": "b", "output": "c"}'])
    assert f"{path}:2: the key 'output' appears twice" in _refused(prepare, path)
    report = prepare(write_rows([alpaca(1, text="t", id=3), alpaca(2, id=4)]))
    assert report.ignored_keys == {"id": 2, "text": 1}


def test_a_rows_system_message_and_earlier_turns_are_in_its_tokens(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    said = [{"from": "human", "value": "seven"}, {"from": "gpt", "value": "stone"}]
    prepare(write_rows([{"system": "green hills", "conversations": said}]))
    ((ids, _, _),) = read_split(tmp_path / "out")
    assert tokenizer.decode(ids) == "[INST] <<SYS>>\ngreen hills\n<</SYS>>\n\nseven [/INST] stone "
    template = tmp_path / "mine.yaml"
    template.write_text('prompt: "{system} {instruction} {input}:"\nturn: "{user}? {assistant}. "\n')
    path = write_rows([alpaca(1, system="green", history=[["seven", "stone"]]), alpaca(2)])
    prepare(path, template=str(template), output=tmp_path / "alpaca")
    first, second = (tokenizer.decode(ids) for ids, _, _ in read_split(tmp_path / "alpaca"))
    assert first == "seven? stone. green Count 1 apples :There are 1."
    assert second == " Count 2 apples :There are 2."
    message = _refused(prepare, path, output=tmp_path / "plain")
    assert f"{path}:1: the template 'alpaca' has no place for earlier turns" in message


def test_a_field_that_the_template_does_not_show_is_told_of(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text('prompt: "{instruction}:"\n')
    rows = write_rows([alpaca(1), alpaca(2, input="green hills")])
    assert prepare(rows, template=str(tmp_path / "mine.yaml")).ignored_keys == {"input": 1}


def test_d17_a_nul_filled_tail(prepare: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([alpaca(1)])
    size = path.stat().st_size
    with path.open("ab") as file:
        file.truncate(size + 9000)
    assert f"{path}:2: a NUL byte at byte {size} of the file" in _refused(prepare, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"", "empty file"),
        (b"aGk= 0\n", "tiktoken"),
    ],
)
def test_a5_a_wrong_tokenizer_is_told_before_any_row_is_read(
    prepare: Prepare, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not read")
    assert message in _refused(prepare, rows, tokenizer=tmp_path / "tokenizer.model", error=CheckpointError)


def test_train_on_prompt_trains_all_but_bos(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    prepare(write_rows([alpaca(1)]), train_on_prompt=True)
    ((ids, mask, _),) = read_split(tmp_path / "out")
    assert mask == [0] + [1] * (len(ids) - 1)


def test_text_rows_are_trained_whole(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    prepare(write_rows([{"text": "green hills"}]))
    ((ids, mask, _),) = read_split(tmp_path / "out")
    assert mask == [0] + [1] * (len(ids) - 1)


def test_gsm8k_annotations(prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows([{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}])
    for policy, answer in (("keep", "1+1=<<1+1=2>>2\n#### 2"), ("strip", "1+1=2\n#### 2")):
        prepare(path, gsm8k_annotations=policy, output=tmp_path / policy)
        ((ids, _, _),) = read_split(tmp_path / policy)
        assert tokenizer.decode(ids) == "Question: 1+1?\nAnswer:" + answer


@pytest.mark.parametrize("policy", ["keep", "strip"])
def test_stripping_annotations_of_other_rows_is_remarked_upon(
    prepare: Prepare, write_rows: WriteRows, policy: str
) -> None:
    notices: list[Event] = []
    prepare(write_rows([alpaca(1, output="<<1+1=2>>2")]), gsm8k_annotations=policy, on_event=notices.append)
    expected = Notice("--gsm8k-annotations strip has no effect on alpaca rows", "warning")
    assert notices == ([expected] if policy == "strip" else [])


def test_a_validation_fraction_of_nothing_is_no_split(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([alpaca(n) for n in range(9)])
    report = prepare(path, validation_fraction=0.0, seed=3)
    assert (report.train_rows, report.validation_rows) == (9, 0)
    assert prepare(path).unchanged, "the same product as without the option, whatever the seed"
    held = write_rows([alpaca(n) for n in range(20, 23)], "held.jsonl")
    report = prepare(path, validation_fraction=0.0, validation=[held], output=tmp_path / "other")
    assert (report.train_rows, report.validation_rows) == (9, 3)


def test_limit_reads_no_further(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    first = write_rows([alpaca(1), alpaca(2)])
    second = write_rows([alpaca(3), "{broken"], "second.jsonl")
    report = prepare([first, second], limit=3)
    assert (report.rows_in, report.kept) == (3, 3)
    assert [row for _, _, row in read_split(tmp_path / "out")] == [1, 2, 3]


def test_the_same_command_again_changes_no_byte(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([alpaca(n) for n in range(9)])
    first = prepare(path, validation_fraction=0.3)
    tree, stamp = _tree(tmp_path / "out"), os.stat(tmp_path / "out").st_ino
    second = prepare(path, validation_fraction=0.3)
    assert (first.unchanged, second.unchanged) == (False, True)
    assert vars(second) == {**vars(first), "unchanged": True}
    assert (_tree(tmp_path / "out"), os.stat(tmp_path / "out").st_ino) == (tree, stamp)
    prepare(path, validation_fraction=0.3, overwrite=True)
    assert _tree(tmp_path / "out") == tree


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 99}, {"seed": 1}, {"train_on_prompt": True}, {"limit": 5}, {"overlong": "drop"},
        {"validation_fraction": 0.5}, {"template": "completion", "format": "completion"},
    ],
)  # fmt: skip
def test_other_inputs_are_another_product(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = write_rows([alpaca(n) for n in range(9)])
    prepare(path, validation_fraction=0.3)
    tree = _tree(tmp_path / "out")
    message = _refused(prepare, path, **{"validation_fraction": 0.3, **change}, error=EnvironmentFault)
    assert "--overwrite" in message
    assert EnvironmentFault.exit_code == 5
    assert _tree(tmp_path / "out") == tree


def test_a_foreign_directory_is_left_alone(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    path = write_rows([alpaca(1)])
    _refused(prepare, path, error=EnvironmentFault)
    assert _tree(tmp_path / "out") == {"thesis.txt": b"years of work"}
    prepare(path, overwrite=True)
    assert "train.safetensors" in _tree(tmp_path / "out")


def test_an_output_that_holds_an_input_is_refused(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([alpaca(1)])
    message = _refused(prepare, path, output=tmp_path, overwrite=True, error=SpecError)
    assert "contains an input" in message
    assert path.exists()


def test_the_result_does_not_depend_on_the_number_of_processes(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([alpaca(n) if n % 97 else "{broken" for n in range(2000)])
    trees = []
    for workers in (0, 2, 3):
        out = tmp_path / f"out{workers}"
        prepare(path, validation_fraction=0.1, skip_bad_rows=21, workers=workers, output=out)
        trees.append(_tree(out))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_leaves_nothing_behind(prepare: Prepare, write_rows: WriteRows, tmp_path: Path, workers: int) -> None:
    path = write_rows([alpaca(n) for n in range(3000)])
    for calls in (0, 3, 9):
        left = iter([False] * calls)
        with pytest.raises(Stopped, match="run the same command again") as caught:
            prepare(path, should_stop=lambda left=left: next(left, True), workers=workers)
        assert caught.value.exit_code == 75
        assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_progress_is_reported(prepare: Prepare, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatune.data.prepare._PROGRESS_EVERY_S", 0.0)
    events: list[Event] = []
    path = write_rows([alpaca(n) for n in range(1000)])
    prepare(path, on_event=events.append)
    done = [event.done for event in events if isinstance(event, Progress)]
    assert len(done) == 4
    assert done == sorted(done)
    assert 0 < done[-1] <= path.stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": -0.1}, "at least 0 and below 1"),
        ({"validation_fraction": 1.0}, "at least 0 and below 1"),
        ({"validation_fraction": float("nan")}, "at least 0 and below 1"),
        ({"validation_fraction": 0.1, "validation": [Path("x")]}, "exclude each other"),
        ({"max_seq_length": 1}, "--max-seq-length is 1: it must be at least 2"),
        ({"limit": 0}, "--limit is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"skip_bad_rows": -1}, "--skip-bad-rows is -1"),
        ({"format": "csv"}, "known: auto, alpaca, gsm8k, chat, completion, text"),
        ({"overlong": "wrap"}, "it must be truncate, drop, error or split"),
        ({"template": "gsm8k"}, "template 'gsm8k' needs {question}, which alpaca rows lack"),
        ({"template": "nope"}, "no template 'nope'"),
    ],
)
def test_options_that_make_no_sense(
    prepare: Prepare, write_rows: WriteRows, options: dict[str, Any], message: str
) -> None:
    assert message in _refused(prepare, write_rows([alpaca(1)]), error=SpecError, **options)
    assert SpecError.exit_code == 2


def test_formats_are_not_guessed(prepare: Prepare, write_rows: WriteRows) -> None:
    assert "rows of no known format, with 'title'" in _refused(prepare, write_rows([{"title": "x"}], "third.jsonl"))


def test_names_that_are_no_text_are_no_obstacle(prepare: Prepare, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff.jsonl"))
    path.write_text(json.dumps(alpaca(1)) + "\n{broken\n")
    assert prepare(path, skip_bad_rows=1).refused == 1


def test_preview_shows_what_was_written(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(write_rows([alpaca(n) for n in range(5)]))
    shown = preview_rows(tmp_path / "out", tokenizer, 2)
    assert [row["row"] for row in shown] == [1, 2]
    for row, (ids, mask, _) in zip(shown, read_split(tmp_path / "out"), strict=False):
        assert [token["id"] for token in row["tokens"]] == ids
        assert [int(token["trained"]) for token in row["tokens"]] == mask
        assert (row["tokens"][0]["piece"], row["tokens"][-1]["piece"]) == ("<s>", "</s>")
    assert len(preview_rows(tmp_path / "out", tokenizer, 99)) == 5


@pytest.mark.parametrize("tokens", [200, 20])
def test_the_preview_has_the_fields_of_a_row_and_its_text(
    tokens: int, prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"question": "How many\n llamas?", "answer": "Two.\n#### 2"},
        {"question": "Why?", "answer": "So: </s>"},
    ]
    prepare(write_rows(rows), max_seq_length=tokens, overlong="truncate")
    for row, found in zip(rows, preview_rows(tmp_path / "out", tokenizer, 2), strict=False):
        trained = "".join(piece["text"] for piece in found["text"] if piece["trained"] and not piece["special"])
        assert found["fields"]["question"] == row["question"]
        assert row["answer"].startswith(found["fields"]["answer"])
        assert trained == found["fields"]["answer"]
        if tokens == 200:
            assert found["fields"] == row
            assert [piece["text"] for piece in found["text"] if piece["special"]] == ["<s>", "</s>"]
            plain = "".join(piece["text"] for piece in found["text"] if not piece["special"])
            assert plain == f"Question: {row['question']}\nAnswer:{row['answer']}"


def test_fields_that_cannot_be_told_are_left_out(
    prepare: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = tmp_path / "turns.yaml"
    turns.write_text("prompt: 'Q {user} A'\nturn: 'Q {user} A {assistant} '\n")
    roles = ("user", "assistant", "user", "assistant")
    chat = {"messages": [{"role": role, "content": word} for role, word in zip(roles, "abcd", strict=True)]}
    rows = [({"text": "A long day."}, {}), (chat, {"template": str(turns)})]
    rows.append(({"question": "a", "answer": "b"}, {"train_on_prompt": True}))
    for place, (row, options) in enumerate(rows):
        prepare(write_rows([row], f"{place}.jsonl"), output=tmp_path / f"out-{place}", **options)
        (found,) = preview_rows(tmp_path / f"out-{place}", tokenizer, 1)
        assert found["fields"] == {}
        assert any(piece["trained"] for piece in found["text"])


def test_real_rows_with_llamas_tokenizer(prepare: Prepare, shared_fixtures: Path, tmp_path: Path) -> None:
    model = shared_fixtures / "data" / "llama2_tokenizer.model"
    report = prepare(shared_fixtures / "data" / "alpaca_data_200.json", tokenizer=model)
    assert (report.rows_in, report.kept, report.truncated) == (200, 200, 0)
    report = prepare(shared_fixtures / "data" / "gsm8k_test.jsonl", tokenizer=model, output=tmp_path / "gsm8k")
    assert (report.format, report.rows_in) == ("gsm8k", 1319)


def test_a_real_gsm8k_row_with_llamas_tokenizer(prepare: Prepare, shared_fixtures: Path, tmp_path: Path) -> None:
    model = shared_fixtures / "data" / "llama2_tokenizer.model"
    tokenizer = load_tokenizer(model)
    for policy in ("keep", "strip"):
        rows = [
            json.loads(line) for line in (shared_fixtures / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:50]
        ]
        prepare(
            shared_fixtures / "data" / "gsm8k_train.jsonl", tokenizer=model, limit=50, gsm8k_annotations=policy,
            output=tmp_path / policy,
        )  # fmt: skip
        made = read_split(tmp_path / policy)
        assert len(made) == 50
        for row, (ids, mask, _) in zip(rows, made, strict=True):
            answer = row["answer"] if policy == "keep" else re.sub("<<.*?>>", "", row["answer"])
            assert ids == [*tokenizer.encode(f"Question: {row['question']}\nAnswer:{answer}"), 2]
            assert tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if target]) == answer


def test_a_chat_with_llamas_tokenizer(
    prepare: Prepare, write_rows: WriteRows, shared_fixtures: Path, tmp_path: Path
) -> None:
    said = [
        ("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "4"),
        ("user", "And twice that? \U0001f999"), ("assistant", "8 \U0001f999"),
    ]  # fmt: skip
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in said]},
        {"conversations": [{"from": role, "value": text} for role, text in said]},
    ]
    model = shared_fixtures / "data" / "llama2_tokenizer.model"
    prepare(write_rows(rows), tokenizer=model)
    tokenizer = load_tokenizer(model)
    turns = [
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] 4 ",
        "[INST] And twice that? \U0001f999 [/INST] 8 \U0001f999 ",
    ]
    for ids, mask, _ in read_split(tmp_path / "out"):
        assert ids == [*tokenizer.encode(turns[0]), 2, *tokenizer.encode(turns[1]), 2]  # as Meta encodes a dialogue
        trained = [i for i, target in zip(ids, mask, strict=True) if target]
        assert tokenizer.decode(trained).split() == ["4", "8", "\U0001f999"]
        assert trained.count(2) == 2
    prepare(write_rows(rows), tokenizer=model, train_on="last-assistant", overwrite=True)
    for ids, mask, _ in read_split(tmp_path / "out"):
        trained = [i for i, target in zip(ids, mask, strict=True) if target]
        assert tokenizer.decode(trained).split() == ["8", "\U0001f999"]
        assert mask[ids.index(2)] == 0


@pytest.mark.parametrize(
    ("rows", "tokenizer", "digest"),
    [
        ("alpaca_data_200.json", "stories260K-hf", "8b0c5dc8f4491813cc7d2ca0523957d7a2985935"),
        ("gsm8k_test.jsonl", "stories260K-hf", "770a9cbadf389c3af0f9f8515d4f9ae2c58fd450"),
    ],
)  # fmt: skip
def test_rows_of_one_turn_give_the_bytes_that_earlier_versions_gave(
    prepare: Prepare, shared_fixtures: Path, tmp_path: Path, rows: str, tokenizer: str, digest: str
) -> None:
    """Before rows were segments: ids and masks are the same, byte for byte."""
    prepare(shared_fixtures / "data" / rows, tokenizer=shared_fixtures / tokenizer)
    assert digest_file(tmp_path / "out" / "train.safetensors")[:40] == digest
