"""What `generate` encodes for a row's prompt is the part of its trained ids that is not a target, for every row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from label_oracle import JsonReference, Reference, SentencePieceReference, in_bytes, spelled
from label_rows import ALPACA, ALPACA_WITHOUT_INPUT
from prepared_rows import read_split

from llamatune.errors import Stopped
from llamatune.inference.model_source import OpenedModel

Command = Callable[..., Any]
Texts = Callable[[dict[str, str]], tuple[str, str]]


def alpaca_text(row: dict[str, str]) -> tuple[str, str]:
    asked = ALPACA.format(row["instruction"], row["input"]) if row.get("input") else None
    return asked or ALPACA_WITHOUT_INPUT.format(row["instruction"]), row["output"]


SPACE = 'prompt: "Instruction: {instruction} {input} Response: "\nprompt_without_input: "Do {instruction} now: "\n'
BREAK = 'prompt: "{instruction}\\n{input}\\n\\n### Response:\\n"\n'
BETWEEN = 'prompt: "{instruction}\\n{input}"\nbefore_completion: "\\n  Answer:\\t "\n'
QUESTION = 'prompt: "Q: {question} A: "\n'
QUESTIONS = 'prompt: "### {question}\\n\\n"\n'


def with_space(row: dict[str, str]) -> tuple[str, str]:
    said, given = row["instruction"], row.get("input")
    return f"Instruction: {said} {given} Response: " if given else f"Do {said} now: ", row["output"]


def with_break(row: dict[str, str]) -> tuple[str, str]:
    return f"{row['instruction']}\n{row.get('input', '')}\n\n### Response:\n", row["output"]


def with_text_between(row: dict[str, str]) -> tuple[str, str]:
    return f"{row['instruction']}\n{row.get('input', '')}", "\n  Answer:\t " + row["output"]


TEMPLATES: dict[str, tuple[str, str, Texts]] = {
    "alpaca": ("alpaca", "", alpaca_text),
    "a space": ("alpaca", SPACE, with_space),
    "a line break": ("alpaca", BREAK, with_break),
    "a text between": ("alpaca", BETWEEN, with_text_between),
    "gsm8k": ("gsm8k", "", lambda row: (f"Question: {row['question']}\nAnswer:", row["answer"])),
    "a space after a question": ("gsm8k", QUESTION, lambda row: (f"Q: {row['question']} A: ", row["answer"])),
    "line breaks after a question": ("gsm8k", QUESTIONS, lambda row: (f"### {row['question']}\n\n", row["answer"])),
    "completion": ("completion", "", lambda row: (row["prompt"], row["completion"])),
}
"""The rows' format, the source of a template that is not built in, and what it makes of a row."""


@pytest.fixture(scope="module")
def bases(
    tiny_base: Callable[..., Path],
    merging_tokenizer: Path,
    shared_fixtures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Reference]]:
    """A model with LLaMA 2's own tokenizer and one with a byte-level one."""
    directory, byte_level = tmp_path_factory.mktemp("asked"), merging_tokenizer
    byte_level_reference = JsonReference(byte_level)
    for name in ("llama2", "byte-level"):
        shutil.copytree(tiny_base(vocab_size=32000), directory / name)
    llama_2 = shared_fixtures / "data" / "llama2_tokenizer.model"
    shutil.copy(llama_2, directory / "llama2" / "tokenizer.model")
    for name in ("tokenizer.model", "generation_config.json"):
        (directory / "byte-level" / name).unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_level / name, directory / "byte-level" / name)
    config = json.loads((directory / "byte-level" / "config.json").read_text())
    ends = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}
    config |= {f"{name}_token_id": byte_level_reference.special(text) for name, text in ends.items()}
    (directory / "byte-level" / "config.json").write_text(json.dumps(config))
    return {
        "llama2": (directory / "llama2", SentencePieceReference(llama_2)),
        "byte-level": (directory / "byte-level", byte_level_reference),
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, command: Command) -> Callable[..., list[list[int]]]:
    """The ids of each prompt that `generate` would give to the model, which is not read."""
    taken: list[list[list[int]]] = []
    encode = OpenedModel.encode

    def stop(self: OpenedModel, *arguments: Any) -> list[list[int]]:
        taken.append(encode(self, *arguments))
        raise Stopped("the prompts are encoded", None, "nothing")

    monkeypatch.setattr(OpenedModel, "encode", stop)

    def ask(*words: object) -> list[list[int]]:
        outcome = command("generate", *words)
        assert taken, outcome.stderr
        return taken.pop()

    return ask


def hard_completions(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Prompts and completions that meet in blanks, signs and parts of characters."""
    ends = ["", " ", "  ", "\n", "\n\n ", "\t", ":", ": ", ": -", "(", "e", "'", "▁", "\u00a0", "\u200d", "\r\n", "<0x"]
    begins = [
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "-",
        "://",
        "\u0301",
        "s",
        "🦙",
        "\u00a0",
        "\n\n",
        "[",
        "12",
        "</s>",
        "▁",
        "'s",
    ]
    return [
        {"prompt": rows[n % len(rows)]["instruction"] + end, "completion": begin + rows[n % len(rows)]["output"]}
        for n, (end, begin) in enumerate((end, begin) for end in ends for begin in begins)
    ]


def check(
    name: str, rows: list[dict[str, str]], base: Path, reference: Reference, asked: Any, command: Command, here: Path
) -> None:
    row_format, source, texts_of = TEMPLATES[name]
    (here / "rows.json").write_text(json.dumps(rows))
    (here / "own.yaml").write_text(source)
    template = here / "own.yaml" if source else row_format
    given = ("--template", template)
    words = ("--tokenizer", base, "--output", here / "out", "--max-seq-length", 1 << 20, "--overwrite")
    outcome = command("prepare-data", here / "rows.json", *words, *given)
    assert outcome.code == 0, outcome.stderr
    prompts = asked("--model", base, "--prompt-file", here / "rows.json", *given)
    trained = read_split(here / "out")
    assert len(trained) == len(prompts) == len(rows)
    for row, prompt, (ids, mask, _) in zip(rows, prompts, trained, strict=True):
        first = mask.index(1)
        assert prompt == ids[:first], row
        assert all(mask[first:]), row
        before, answer = texts_of(row)
        assert spelled(reference, ids[1:-1]) == in_bytes(reference, before + answer), row
        assert in_bytes(reference, before).startswith(spelled(reference, ids[1:first])), row
        left = in_bytes(reference, before).removeprefix(spelled(reference, ids[1:first]))
        assert not left.decode().strip(), f"white space alone may go over to the answer: {row}"


@pytest.mark.parametrize("tokenizer", ["llama2", "byte-level"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_encoded_as_it_was_trained(
    bases: dict[str, tuple[Path, Reference]],
    asked: Callable[..., list[list[int]]],
    command: Command,
    shared_fixtures: Path,
    tmp_path: Path,
    name: str,
    tokenizer: str,
) -> None:
    alpacas = json.loads((shared_fixtures / "data" / "alpaca_data_200.json").read_text())
    lines = (shared_fixtures / "data" / "gsm8k_train.jsonl").read_text().splitlines()
    rows = {"alpaca": alpacas, "gsm8k": list(map(json.loads, lines[:50])), "completion": hard_completions(alpacas)}
    check(name, rows[TEMPLATES[name][0]], *bases[tokenizer], asked, command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["llama2", "byte-level"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name][0] == "gsm8k"])
def test_every_question_of_gsm8k(
    bases: dict[str, tuple[Path, Reference]],
    asked: Callable[..., list[list[int]]],
    command: Command,
    shared_fixtures: Path,
    tmp_path: Path,
    name: str,
    tokenizer: str,
) -> None:
    files = [shared_fixtures / "data" / f"gsm8k_{split}.jsonl" for split in ("train", "test")]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(rows) > 8000
    check(name, rows, *bases[tokenizer], asked, command, tmp_path)
