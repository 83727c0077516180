"""``--prompt-file``: rows as ``prepare-data`` reads them, or one prompt a line, and never the one for the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.data.chat_template import built_in_chat_template
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.row_json import decode_row
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.inference.prompt_files import prompt_text, read_prompts
from llamatune.tokenizers.tokenizer import Tokenizer

ROWS = [{"instruction": "Name it.", "input": "red", "output": "x"}, {"instruction": "Count."}]
SAID = [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"}]
ALPACA = TEMPLATES["alpaca"]


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., list[str]]:
    """What the model is shown for a file of prompts with this content."""

    def shown(content: Any, template: Template | None = ALPACA, name: str = "prompts") -> list[str]:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return [prompt_text(prompt, template, number) for number, prompt in enumerate(read_prompts(path), 1)]

    return shown


@pytest.mark.parametrize("name", ["rows.json", "rows.txt"])
def test_a_list_and_json_lines_give_the_same_prompts(texts: Callable[..., list[str]], name: str) -> None:
    expected = [
        ALPACA.prompt_of({"instruction": "Name it.", "input": "red"}),
        ALPACA.prompt_of({"instruction": "Count.", "input": ""}),
    ]
    lines = "\n".join(map(json.dumps, ROWS))
    for content in (ROWS, json.dumps(ROWS, indent=2), "\ufeff\n " + json.dumps(ROWS), lines, "\n" + lines + "\n\n"):
        assert texts(content, name=name) == expected
    assert texts(["a", "b \n c"], None, name) == ["a", "b \n c"]


@pytest.mark.parametrize(
    "lines",
    [
        ["[INST] hi [/INST]", "more"], ["[1] Who?", "[2] When?"], ["[[Paris]] is"], ["[] is an empty list. Why?"],
        ["{name} is", "{{x}}"], ["{ x | x > 0 } is"], ["a", "[b", "{c"], ["[", "x"], ["{"],
    ],
)  # fmt: skip
def test_plain_text_stays_one_prompt_a_line(texts: Callable[..., list[str]], lines: list[str]) -> None:
    assert texts("\r\n\n".join(lines) + "\n", None) == [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a"}, {"instruction" "b"}]', "not valid JSON: Expecting ':' delimiter at column 16"),
        ('[{"instruction": "a"}, {"instruction" "b"}]', "prompts: row 2: "),
        ('[\n{"instruction": "a"},\n{"instruction": "b"', "prompts:3: row 2: "),
        ('{"instruction": "a"}\nplain\n', "not valid JSON: Expecting value at column 1: "),
        ('{"instruction": "a"}\nplain\n', "prompts:2: "),
        ('plain\n{"instruction": "a"}\n', "a JSON row in a file that begins as plain text: "),
        ("[{'instruction': 'a'}]", "prompts: row 1: "),
        ("[1, 2]", "a number where a row or a prompt is expected"),
        ('["a", " "]', "an empty text where a row or a prompt is expected"),
        ("[]", "no prompts"),
        ("\n \n", "no prompts"),
        ([{"instruction": "a", "input": 7}], "field 'input' of the row is a number, not a string"),
        ([{"instruction": ["a"]}], "field 'instruction' of the row is a list, not a string"),
        ([{"instruction": "a", "inputs": "b"}], "unknown field 'inputs', did you mean 'input'?"),
        ([{"instruction": "a", "tools": ["f"]}], "field 'tools' would be lost"),
        ([{"messages": []}], "'messages' has no message of the user"),
        ([{"messages": [{"role": "system", "content": "s"}]}], "'messages' has no message of the user"),
        ([{"messages": [{"role": "user", "content": ["u"]}]}], "field 'content' of message 1 of 'messages' is a list"),
        ([{"instruction": "a", "system": "s"}], "no place for a system message"),
        ([{"instruction": "a", "history": [["u", "a"]]}], "no place for earlier turns"),
        ([{"messages": SAID}], "no field 'instruction' for the template 'alpaca'"),
        ([{"text": "a"}], "no field 'instruction' for the template 'alpaca'"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(texts: Callable[..., list[str]], content: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        texts(content)
    assert message in str(caught.value)


def test_a_name_of_rows_says_that_plain_lines_are_none(texts: Callable[..., list[str]]) -> None:
    with pytest.raises(DataError, match="not valid JSON"):
        texts("[INST] hi\nplain\n", name="prompts.jsonl")


def test_chat_rows_are_prompts_with_their_earlier_turns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "u1"}, {"from": "gpt", "value": "a1"}]
    rows = [{"messages": SAID}, {"messages": [*SAID, {"role": "assistant", "content": "a2"}]}, {"conversations": turns}]
    rows += [{"system": "s", "conversations": turns[:1]}, {"instruction": "u1", "input": "more"}]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, "u1"]))
    encoder = PromptEncoder(tokenizer, built_in_chat_template("llama2-chat", tokenizer))
    shown = [encoder.segments(prompt, 1).shown for prompt in read_prompts(tmp_path / "rows.json")]
    assert shown == [
        "<s>[INST] u1 [/INST] a1 </s><s>[INST] u2 [/INST]",
        "<s>[INST] u1 [/INST] a1 </s><s>[INST] u2 [/INST]",
        "<s>[INST] u1 [/INST]",
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu1 [/INST]",
        "<s>[INST] u1\n\nmore [/INST]",
        "<s>[INST] u1 [/INST]",
    ]
    with pytest.raises(DataError, match=r"no field for the user's turn .*: prompt 3: its text fields are 'topic'"):
        encoder.segments({"topic": "rain"}, 3)


def test_other_fields_of_a_row_may_fill_a_template_if_they_are_texts(texts: Callable[..., list[str]]) -> None:
    row = {"topic": "rain", "id": 7}
    assert texts([row], Template("x", "On {topic}:")) == ["On rain:"]
    with pytest.raises(DataError, match="a field that is not text, 'id' for the template 'x'"):
        texts([row], Template("x", "{id} {topic}:"))
    assert texts([{"text": "Once"}], TEMPLATES["text"]) == ["Once"]
    assert texts([{"prompt": "Once", "n": 1}], None) == ["Once"]


def test_a_file_that_was_prepared_gives_the_prompts_that_were_trained(shared_fixtures: Path) -> None:
    path = shared_fixtures / "data" / "alpaca_data_200.json"
    trained = [ALPACA.prompt_of(row_of(decode_row(raw), FORMATS["alpaca"]).fields) for raw in read_raw_rows(path)]
    assert [prompt_text(prompt, ALPACA, 1) for prompt in read_prompts(path)] == trained


def test_generate_answers_each_row_of_a_list(
    command: Callable[..., Any], tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a red llama"}, {"instruction": "nine"}], indent=2))
    outcome = command(
        "generate", "--model", tiny_base(), "--template", "alpaca", "--prompt-file", tmp_path / "rows.json",
        "--max-new-tokens", "2", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    prompts = [result["prompt"] for result in json.loads(outcome.stdout)["results"]]
    assert prompts == [ALPACA.instruction_prompt("a red llama"), ALPACA.instruction_prompt("nine")]
