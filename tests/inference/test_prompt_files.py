"""``--prompt-file``: rows as ``prepare-data`` reads them, or one prompt a line, and never the one for the other."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.command_options.inference import MergeOptions
from llamatune.data.chat_template import built_in_chat_template
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.row_json import decode_row
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError, LlamatuneError
from llamatune.events import ignore_event
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.inference.prompt_files import FilePrompt, prompt_text, read_prompts
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
        ('[{"instruction": "a"}, {"instruction" "b"}]', "not valid JSON: a colon is expected at column 16"),
        ('[{"instruction": "a"}, {"instruction" "b"}]', "prompts: row 2: "),
        ('[\n{"instruction": "a"},\n{"instruction": "b"', "prompts:3: row 2: "),
        ('{"instruction": "a"}\nplain\n', "not valid JSON: a value is expected at column 1: "),
        ('{"instruction": "a"}\nplain\n', "prompts:2: "),
        ('plain\n{"instruction": "a"}\n', "a line of JSON in a file of plain text: "),
        ("[{'instruction': 'a'}]", "prompts: row 1: "),
        ("[1, 2]", "a number where a row or a prompt is expected"),
        ('["a", " "]', "an empty text where a row or a prompt is expected"),
        ("[]", "no prompts"),
        ("\n \n", "no prompts"),
        ([{"instruction": "a", "input": 7}], "field 'input' of the row is a number, not a string"),
        ([{"instruction": ["a", "b"]}], "field 'instruction' of the row is a list, not a string"),
        ([{"instruction": "a", "inputs": "b"}], "unknown field 'inputs', did you mean 'input'?"),
        ([{"instruction": "a", "tools": ["f"]}], "field 'tools' would be lost"),
        ([{"messages": []}], "'messages' has no message of the user"),
        ([{"messages": [{"role": "system", "content": "s"}]}], "'messages' has no message of the user"),
        ([{"messages": [{"role": "user", "content": 7}]}], "field 'content' of message 1 of 'messages' is a number"),
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


ROWS_AS_LINES = '{"instruction": "a", "output": "x"}\n\n{"instruction": "b"}\n'
TABLE = 'instruction,output\na,x\n"b",\n'


def _zipped(content: bytes) -> bytes:
    """The same bytes at any time, since test processes name the test by them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("rows.jsonl", ROWS_AS_LINES, [":1", ":3: row 2"]),
        ("rows", ROWS_AS_LINES, [":1", ":3: row 2"]),
        ("rows.json.gz", _zipped(json.dumps([{"instruction": "a", "output": "x"}, ROWS[1] | {"instruction": "b"}],
                                                  indent=1).encode()), [":2: row 1", ":6: row 2"]),
        ("rows.txt.gz", _zipped(ROWS_AS_LINES.encode()), [":1", ":3: row 2"]),
        ("rows.csv", TABLE, [":2: row 1", ":3: row 2"]),
        ("rows.tsv.gz", _zipped(TABLE.replace(",", "\t").encode()), [":2: row 1", ":3: row 2"]),
        ("rows.json", json.dumps({"data": [{"instruction": "a", "output": "x"}, {"instruction": "b"}]}),
         [": row 1", ": row 2"]),
    ],
)  # fmt: skip
def test_files_are_those_that_prepare_data_reads(
    name: str, content: str | bytes, places: list[str], tmp_path: Path
) -> None:
    """Each prompt has its row's number and place, and the answer that the row has."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    first, second = read_prompts(path)
    assert isinstance(first, FilePrompt)
    assert isinstance(second, FilePrompt)
    assert [prompt_text(prompt, ALPACA, 1) for prompt in (first, second)] == [
        ALPACA.instruction_prompt("a"), ALPACA.instruction_prompt("b")
    ]  # fmt: skip
    assert (first.row, first.reference, second.row, second.reference) == (1, "x", 2, None)
    assert [first.where, second.where] == [f"{path}{place}" for place in places]
    assert first.labelled({"completion": "y"}) == {"row": 1, "completion": "y", "reference": "x"}
    assert second.labelled({"completion": "y"}) == {"row": 2, "completion": "y"}


def test_columnar_files_and_pipes_are_read(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"question": ["q"], "answer": ["#### 1"]}), tmp_path / "rows.parquet")
    (prompt,) = read_prompts(tmp_path / "rows.parquet")
    assert isinstance(prompt, FilePrompt)
    assert (prompt.where, prompt.reference) == (f"{tmp_path / 'rows.parquet'}: row 1", "#### 1")
    os.mkfifo(tmp_path / "pipe")
    for content, count in (("a\nb\n", 2), ('["a", "b", "c"]', 3)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(content,))
        writer.start()
        assert len(read_prompts(tmp_path / "pipe")) == count
        writer.join()


@pytest.mark.parametrize(
    ("name", "content", "format", "expected"),
    [
        ("p.txt", 'a\n\n{"instruction": "b"}\n["c"]\n', "text", ["a", '{"instruction": "b"}', '["c"]']),
        ("p.txt", '[{"instruction": "a"}]', "text", ['[{"instruction": "a"}]']),
        ("p.txt", '"a"\n\n"b"\n', "auto", ["a", "b"]),
        ("p.txt", "42\nnull\ntrue\n-1.5\n", "auto", ["42", "null", "true", "-1.5"]),
        ("p.txt", 'a\n["b"]\n', "auto", "a line of JSON in a file of plain text: PATH:2: "),
        ("p.txt", 'a\n\n"b"\n', "auto", "a line of JSON in a file of plain text: PATH:3: "),
        ("p.txt", '{"instruction": "a"}\nb\n', "auto", "not valid JSON"),
        ("p.txt", "[\n1,\n2\n]", "auto", "a number where a row or a prompt is expected"),
        ("p.txt", "[]", "auto", "no prompts"),
        ("p.txt", "a\0b\n", "auto", "no text: a NUL byte at byte 1"),
        ("p.txt", "a\n", "alpaca", "no field 'instruction'"),
        ("p.jsonl", '{"text": "a"}\n', "text", ["a"]),
        ("p.jsonl", '{"instruction": "a"}\n', "text", "no field 'text'; the row has 'instruction'"),
        ("p.jsonl", '{"instruction": "a"}\n', "gsm8k", "no field 'question'"),
        ("p.jsonl", '{"instruction": "a"}\n', "chat", "no field 'messages'"),
        ("p.jsonl", '{"prompt": "a", "question": "b"}\n', "completion", ["a"]),
        ("p.jsonl", '{"prompt": ""}\n', "completion", "field 'prompt' of the row is empty"),
        ("p.txt", "a\n", "rows", "--format is 'rows': known: auto, alpaca, gsm8k, chat, completion, text"),
        ("p.gz", _zipped(b"words " * 9999)[:-9], "auto", "the compressed file was cut off"),
        ("p.zip", b"PK\x03\x04" + bytes(40), "auto", "a zip archive, not a file of rows"),
    ],
)  # fmt: skip
def test_text_is_text_where_no_line_is_json_or_where_it_is_called_so(
    name: str, content: str | bytes, format: str, expected: list[str] | str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str):
        with pytest.raises(LlamatuneError) as caught:
            read_prompts(path, format)
        assert expected.replace("PATH", str(path)) in str(caught.value)
    else:
        template = TEMPLATES["text"] if name == "p.jsonl" and format == "text" else None
        assert [prompt_text(prompt, template, 1) for prompt in read_prompts(path, format)] == expected


@pytest.mark.parametrize(
    ("row", "format", "column_map", "expected"),
    [
        ({"query": "q", "reply": "r"}, "auto", "instruction=query,output=reply", ("q", "r")),
        ({"query": "q"}, "auto", "instruction=query,output=reply", ("q", None)),
        ({"query": "q", "reply": None}, "alpaca", "instruction=query,output=reply", ("q", None)),
        ({"instruction": "q", "context": "c", "response": "r"}, "auto", "dolly", ("q\n\nc", "r")),
        ({"instruction": "q", "context": "c", "response": "r"}, "auto", None, ("q\n\nc", "r")),
        ({"instruction": "q", "context": "c"}, "auto", "dolly", ("q\n\nc", None)),
        ({"ask": "q", "say": "r"}, "auto", "user=ask,assistant=say", ("q", "r")),
        ({"ask": "q"}, "auto", "user=ask,assistant=say", ("q", None)),
        ({"system_prompt": "", "question": "q", "response": "r"}, "auto", "openorca", ("q", "r")),
        ({"reply": "r"}, "auto", "instruction=query,output=reply", "no column 'query' (instruction=query of --map)"),
        ({"prompt": "p", "question": "q", "answer": "a", "completion": "c"}, "auto", None, "with --format gsm8k"),
        ({"prompt": "p", "question": "q", "answer": "a", "completion": "c"}, "gsm8k", None, ("q", "a")),
        ({"query": "q"}, "auto", "instruction:query", "is neither FIELD=COLUMN nor a preset"),
    ],
)  # fmt: skip
def test_columns_are_named_as_for_prepare_data(
    row: Any, format: str, column_map: str | None, expected: tuple[str, str | None] | str, tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "rows").write_text(json.dumps(row))
    if isinstance(expected, str):
        with pytest.raises(LlamatuneError) as caught:
            read_prompts(tmp_path / "rows", format, column_map)
        assert expected in str(caught.value)
        return
    (prompt,) = read_prompts(tmp_path / "rows", format, column_map)
    assert isinstance(prompt, FilePrompt)
    encoder = PromptEncoder(tokenizer, built_in_chat_template("llama2-chat", tokenizer))
    assert encoder.segments(prompt, 1).shown == f"<s>[INST] {expected[0]} [/INST]"
    assert prompt.reference == expected[1]


def test_questions_and_probes_are_read_by_the_same_code(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from llamatune.inference.gsm8k import read_questions
    from llamatune.merge_proof import _probe

    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"question,answer\nnine apples?,#### 9\n"))
    assert [question.expected for question in read_questions(tmp_path / "rows.csv.gz")] == ["9"]
    options = MergeOptions(tiny_tokenizer, tmp_path / "adapter", tmp_path / "out", template="gsm8k")
    with _probe(options, tmp_path / "rows.csv.gz", ignore_event, lambda: False) as (split, _):
        assert len(split) == 1


def test_generate_numbers_its_answers_and_shows_those_of_the_rows(
    command: Callable[..., Any], tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    """A conversation is asked with its system message and earlier answers; the answer at its end is the reference."""
    answered = [{"role": "system", "content": "s"}, *SAID, {"role": "assistant", "content": "a2"}]
    lines = [json.dumps({"messages": messages}) for messages in (answered, SAID)]
    (tmp_path / "chats.jsonl").write_text("\n\n".join(lines))
    words = ("generate", "--model", tiny_base(), "--prompt-file", tmp_path / "chats.jsonl", "--max-new-tokens", "1")
    done = command(*words, "--template", "llama2-chat", "--output", tmp_path / "answers.jsonl", "--json")
    assert done.code == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert json.loads(done.stdout)["results"] == written
    assert [(line["row"], line["prompt"], line.get("reference")) for line in written] == [
        (1, "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu1 [/INST] a1 </s><s>[INST] u2 [/INST]", "a2"),
        (2, "<s>[INST] u1 [/INST] a1 </s><s>[INST] u2 [/INST]", None),
    ]
    assert next(iter(written[0])) == "row"
    refused = command(*words, "--template", "alpaca")
    assert (refused.code, f"{tmp_path / 'chats.jsonl'}:1: " in refused.stderr) == (3, True)
    assert command(*words, "--format", "alpaca").code == 3
    assert command(*words[:3], "--prompt", "x", "--format", "chat").code == 2
    assert command(*words[:3], "--prompt", "x", "--map", "dolly").code == 2
    assert command("report", "run", "--output", tmp_path / "x", "--prompt", "x", "--format", "chat").code == 2


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
