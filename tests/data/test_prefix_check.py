from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepared_rows import alpaca

from llamatune.data.prefix_check import PromptCheck
from llamatune.events import Event, Notice
from llamatune.strict_json import dump_json, read_json
from llamatune.tokenizers.loading import load_tokenizer

Prepare = Callable[..., SimpleNamespace]
WriteRows = Callable[..., Path]

PARTS = [
    "a", "the", "in", " ", "  ", "\n", ":", "é", "\U0001f999", "apples", "7", "(", "日本", "Response", ".", "\t", "'s",
    "▁", "://", "llama", "ﬁ", "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "unigram", "normalising", "suffix", "llama"])
def test_the_check_says_what_encoding_the_whole_prompt_says(
    tokenizer_models: dict[str, Path], request: pytest.FixtureRequest, kind: str
) -> None:
    real = kind == "llama"
    tokenizer = load_tokenizer(
        request.getfixturevalue("shared_fixtures") / "data" / "llama2_tokenizer.model"
        if real
        else tokenizer_models[kind]
    )
    check, chance = PromptCheck(tokenizer), random.Random(5)
    assert check._by_word == (kind in ("bpe", "unigram", "llama")), "the two ways are both tried"
    verdicts = []
    for _ in range(4000):
        prompt = "".join(chance.choices(PARTS, k=chance.randint(0, 12)))
        completion = "".join(chance.choices(PARTS, k=chance.randint(1, 6)))
        ids, _ = tokenizer.encode_pair(prompt, completion)
        alone = tokenizer.encode(prompt)
        verdicts.append(ids[: len(alone)] == alone)
        assert check.is_prefix(prompt, completion, ids) == verdicts[-1], (prompt, completion)
    assert 0 < verdicts.count(False) < len(verdicts)


@pytest.mark.parametrize("workers", [0, 2])
def test_prompts_that_end_in_a_space_are_counted_and_the_remedy_is_told_and_works(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path, workers: int
) -> None:
    mine = tmp_path / "mine.yaml"
    path = write_rows([alpaca(n) for n in range(30)])
    notices: list[Event] = []
    mine.write_text('prompt: "Question: {instruction} Answer: "\n')
    report = prepare(path, template=str(mine), workers=workers, on_event=notices.append)
    assert report.prompts_not_prefix == report.kept == 30
    (warning,) = (event for event in notices if isinstance(event, Notice))
    assert warning.kind == "warning"
    assert "30 of 30 rows begin with other tokens than their prompt encoded alone" in warning.message
    assert "before_completion" in warning.message
    notices.clear()
    mine.write_text('prompt: "Question: {instruction} Answer:"\nbefore_completion: " "\n')
    report = prepare(path, template=str(mine), workers=workers, overwrite=True, on_event=notices.append)
    assert report.prompts_not_prefix == 0
    assert not any(isinstance(event, Notice) for event in notices)


def test_a_prompt_of_a_row_may_end_in_a_space_too(prepare: Prepare, write_rows: WriteRows) -> None:
    rows = [{"prompt": "seven ", "completion": "stone"}, {"prompt": "seven", "completion": " stone"}]
    assert prepare(write_rows(rows)).prompts_not_prefix == 1


def test_a_directory_from_before_they_were_counted_still_opens(
    prepare: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([alpaca(1)])
    prepare(path)
    manifest = read_json(tmp_path / "out" / "llamatune.json")
    del manifest["facts"]["prompts_not_prefix"]
    (tmp_path / "out" / "llamatune.json").write_bytes(dump_json(manifest))
    report = prepare(path)
    assert (report.unchanged, report.prompts_not_prefix) == (True, None)


def test_real_rows(prepare: Prepare, shared_fixtures: Path) -> None:
    """Alpaca's completions follow a colon at once, and LLaMA has pieces such as ``:-`` and ``:[``."""
    rows = shared_fixtures / "data" / "alpaca_data_200.json"
    assert prepare(rows, tokenizer=shared_fixtures / "data" / "llama2_tokenizer.model").prompts_not_prefix == 9
