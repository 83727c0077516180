"""Random rows and conversations are prepared, and ids and targets compared with the label oracle's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from label_oracle import JsonReference, Reference, SentencePieceReference, told_by_bytes, told_by_offsets
from label_rows import (
    BARE,
    OWN,
    SPACED,
    TURNS,
    Case,
    Made,
    Turn,
    alpaca,
    bare,
    chat,
    chatml,
    chatml_after_bos,
    completion,
    gsm8k,
    instructions,
    llama_2,
    llama_3,
    own,
    spaced,
    text,
    turns,
)
from prepared_rows import read_split

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data

PROMPT = {"train_on_prompt": True}
LAST = {"train_on": "last-assistant"}

CASES = {
    "alpaca": Case("llama2", alpaca),
    "alpaca, its prompt too": Case("bpe", alpaca, options=PROMPT),
    "gsm8k": Case("llama2", gsm8k, options={"max_seq_length": 40}),
    "completion": Case("llama2", completion),
    "completion, cut": Case("bpe", completion, options={"max_seq_length": 30}),
    "text": Case("llama2", text, options={"max_seq_length": 12}),
    "own, ending in a space": Case("llama2", own(" A: "), "own.yaml", OWN % (" A: ", "")),
    "own, ending in a line break": Case("bpe", own("\n"), "own.yaml", OWN % ("\\n", "")),
    "own, with a text before": Case("llama2", own("\nA:", " \n"), "own.yaml", OWN % ("\\nA:", " \\n")),
    "turns": Case("llama2", chat, "turns.yaml", TURNS, LAST, turns),
    "llama2-chat": Case("llama2", chat, "llama2-chat", layout=llama_2),
    "llama2-chat, last": Case("llama2", chat, "llama2-chat", options=LAST, layout=llama_2),
    "llama2-chat, cut": Case("bpe", chat, "llama2-chat", options={"max_seq_length": 60}, layout=llama_2),
    "llama2-chat, the prompt too": Case("llama2", chat, "llama2-chat", options=PROMPT, layout=llama_2),
    "llama2-chat of alpaca": Case("llama2", instructions, "llama2-chat", layout=llama_2),
    "bare": Case("llama2", chat, "bare.jinja", BARE, layout=bare),
    "spaced": Case("llama2", chat, "spaced.jinja", SPACED, layout=spaced),
    "byte-level alpaca": Case("llama_3", alpaca, options={"max_seq_length": 200}),
    "byte-level completion": Case("merging", completion),
    "byte-level text": Case("llama_3", text, options={"max_seq_length": 16}),
    "byte-level, ending in a space": Case("merging", own(" A: "), "own.yaml", OWN % (" A: ", "")),
    "byte-level, ending in a line break": Case("merging", own("\n"), "own.yaml", OWN % ("\\n", "")),
    "composing completion": Case("composing", completion, options=PROMPT),
    "llama3-chat": Case("merging", chat, "llama3-chat", layout=llama_3),
    "llama3-chat, last, the prompt too": Case("merging", chat, "llama3-chat", options=LAST | PROMPT, layout=llama_3),
    "chatml after a bos": Case("merging", chat, "chatml", layout=chatml_after_bos),
    "chatml": Case("marked", chat, "chatml", layout=chatml),
    "chatml, marked": Case("marked", chat, "model", options={"max_seq_length": 90}, layout=chatml),
}


@pytest.fixture(scope="module")
def tokenizers(
    tokenizer_models: dict[str, Path],
    json_tokenizers: dict[str, Path],
    chat_tokenizers: dict[str, Path],
    merging_tokenizer: Path,
    shared_fixtures: Path,
) -> Callable[[str], tuple[Path, Reference]]:
    """A tokenizer's file or directory, and the library that reads it."""
    paths = {"llama2": shared_fixtures / "data" / "llama2_tokenizer.model", "bpe": tokenizer_models["bpe"]}
    paths |= {"llama_3": json_tokenizers["llama_3"], "composing": json_tokenizers["smollm"], **chat_tokenizers}
    paths["merging"] = merging_tokenizer
    made: dict[str, tuple[Path, Reference]] = {}

    def give(kind: str) -> tuple[Path, Reference]:
        if kind not in made:
            path = paths[kind]
            made[kind] = path, SentencePieceReference(path) if path.is_file() else JsonReference(path)
        return made[kind]

    return give


def compare(case: Case, tokenizer: Path, reference: Reference, rows: list[Made], directory: Path) -> None:
    """Prepare ``rows`` and compare every id, every target, and what was left out."""
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, (row, _) in enumerate(rows)]
    (directory / "rows.jsonl").write_bytes("".join(lines).encode())
    template = case.template
    if case.file:
        template = str(directory / str(case.template))
        Path(template).write_text(case.file)
    refused = sum(parts is None for _, parts in rows)
    options = PrepareOptions(
        rows=[directory / "rows.jsonl"],
        tokenizer=tokenizer,
        output=directory / "out",
        template=template,
        overwrite=True,
        skip_bad_rows=refused,
        **case.options,
    )
    report = prepare_data(options, workers=0)
    found = {row: (ids, mask) for ids, mask, row in read_split(directory / "out")}
    targets, limit = 0, options.max_seq_length
    for number, (row, parts) in enumerate(rows, 1):
        if parts is None:
            assert number not in found, row
            continue
        ids, mask = told_by_offsets(reference, parts)
        if not reference.normalises:
            assert mask == told_by_bytes(reference, ids, parts), f"the two ways of the oracle agree: {row}"
        assert (found.get(number) is None) == (not any(mask[:limit])), row
        if number in found:
            assert found[number] == (ids[:limit], mask[:limit]), row
            targets += sum(mask[:limit])
    assert (report["rows_in"], report["refused"], report["kept"]) == (len(rows), refused, len(found))
    assert report["dropped"] == len(rows) - refused - len(found)
    assert report["target_tokens"] == targets


def compare_random(name: str, count: int, tokenizers: Callable[[str], tuple[Path, Reference]], directory: Path) -> None:
    case, chance = CASES[name], random.Random(f"{name} {count}")
    compare(case, *tokenizers(case.tokenizer), [case.make(chance, case) for _ in range(count)], directory)


@pytest.mark.parametrize("name", CASES)
def test_three_hundred_rows(tokenizers: Callable[[str], tuple[Path, Reference]], tmp_path: Path, name: str) -> None:
    assert 12 * len(CASES) >= 300
    compare_random(name, 12, tokenizers, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [116, 1154])
@pytest.mark.parametrize("name", CASES)
def test_three_thousand_and_thirty_thousand_rows(
    tokenizers: Callable[[str], tuple[Path, Reference]], tmp_path: Path, name: str, count: int
) -> None:
    assert count * len(CASES) >= {116: 3000, 1154: 30000}[count]
    compare_random(name, count, tokenizers, tmp_path)


def test_a_turn_of_weight_0_is_not_trained_as_part_of_a_prompt(
    tokenizers: Callable[[str], tuple[Path, Reference]], tmp_path: Path
) -> None:
    case, (path, reference) = CASES["turns"], tokenizers("llama2")
    case = replace(case, options={**case.options, **PROMPT})
    said = [Turn(("user", "assistant")[n % 2], text, True) for n, text in enumerate(("a", "seven", "b", "hills"))]
    messages = [{"role": role, "content": content} for role, content, _ in said]
    weighted = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    rows: list[Made] = [({"messages": messages}, turns(said, True)), ({"messages": weighted}, None)]
    compare(case, path, reference, rows, tmp_path)
