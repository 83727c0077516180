from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.template_choice import load_template, stored_template
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import CheckpointError, DataError, SpecError
from llamatune.tokenizers.tokenizer import Tokenizer


def test_the_alpaca_prompts_are_stanfords(tokenizer: Tokenizer) -> None:
    template = load_template("alpaca", tokenizer)
    assert template.prompt_of({"instruction": "Add.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2"
        "\n\n### Response:"
    )
    assert template.prompt_of({"instruction": "Add.", "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert template.completion_of("3") == "3"
    assert template.instruction_prompt("Add.") == template.prompt_of({"instruction": "Add.", "input": ""})


def test_the_other_built_in_prompts(tokenizer: Tokenizer) -> None:
    assert load_template("gsm8k", tokenizer).instruction_prompt("1+1?") == "Question: 1+1?\nAnswer:"
    assert load_template("completion", tokenizer).instruction_prompt("Once") == "Once"
    assert load_template("text", tokenizer).instruction_prompt("Once") == "Once"


def test_a_template_that_would_lose_a_part_of_a_chat_says_so() -> None:
    said = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    row = row_of({"messages": [{"role": r, "content": c} for r, c in said]}, FORMATS["chat"])
    whole = Template("x", "{user}", system="{system}{user}", turn="{user}{assistant}")
    assert whole.misfit(row) is None
    assert "earlier turns" in str(Template("x", "{user}").misfit(row))
    assert "system message" in str(Template("x", "{user}", turn="{user}{assistant}").misfit(row))


def test_a_template_shows_an_alpaca_rows_system_and_history_or_says_so() -> None:
    row = {"instruction": "i", "output": "o", "system": "s", "history": [["u", "a"]]}
    made = row_of(row, FORMATS["alpaca"])
    whole = Template("x", "{system}|{instruction}|{input}", "{system}|{instruction}", turn="{user}>{assistant}|")
    assert whole.misfit(made) is None
    assert whole.prompt_of(made.fields, made.turns) == "u>a|s|i"
    assert whole.prompt_of({"instruction": "i", "input": ""}) == "|i", "rows without a system message fit too"
    assert "earlier turns (of 'messages', 'conversations' or 'history')" in str(TEMPLATES["alpaca"].misfit(made))
    alone = row_of({**row, "history": []}, FORMATS["alpaca"])
    assert "system message ('system')" in str(TEMPLATES["alpaca"].misfit(alone))
    half = Template("x", "{system}|{instruction}|{input}", "{instruction}")  # this row has no input
    assert "system message ('system')" in str(half.misfit(alone))
    assert half.misfit(row_of({**row, "history": [], "input": "x"}, FORMATS["alpaca"])) is None


def test_every_format_has_a_template_it_can_fill() -> None:
    for name, row_format in FORMATS.items():
        if name != "chat":
            assert TEMPLATES[name].placeholders <= set(row_format.prompt_fields)


def test_a_stored_llama2_chat_of_earlier_versions_still_fills_its_prompts() -> None:
    said = [("system", "Be kind."), ("user", "u1"), ("assistant", " a1 "), ("user", "u2"), ("assistant", "a2 ")]
    row = row_of({"messages": [{"role": r, "content": c} for r, c in said]}, FORMATS["chat"])
    stored = {
        "name": "llama2-chat", "prompt": "[INST] {user} [/INST]", "system": "<<SYS>>\n{system}\n<</SYS>>\n\n{user}",
        "turn": "[INST] {user} [/INST] {assistant} ", "before_completion": " ", "strip": True,
    }  # fmt: skip
    template = stored_template(stored)
    assert isinstance(template, Template)
    assert template.prompt_of(row.fields, row.turns) == (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nu1 [/INST] a1 [INST] u2 [/INST]"
    )
    assert template.completion_of(row.completion) == " a2"
    single = row_of({"messages": [{"role": r, "content": c} for r, c in (said[0], said[1], said[4])]}, FORMATS["chat"])
    assert template.prompt_of(single.fields) == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nu1 [/INST]"
    assert template.instruction_prompt(" Hi ") == "[INST] Hi [/INST]"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_survive_being_stored(name: str) -> None:
    assert Template.from_dict(TEMPLATES[name].to_dict()) == TEMPLATES[name]


@given(st.text(), st.text())
def test_text_of_a_row_is_never_looked_at_again(instruction: str, context: str) -> None:
    template = Template("x", "{{a}} {instruction}|{input}")
    assert template.prompt_of({"instruction": instruction, "input": context}) == f"{{a}} {instruction}|{context}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a map of names"),
        ({"name": "x"}, "no 'prompt'"),
        ({"prompt": "x"}, "no 'name'"),
        ({"name": "x", "prompt": 3}, "'prompt' of a template must be a text"),
        ({"name": "x", "prompt": None}, "'prompt' of a template must be a text"),
        ({"name": "x", "prompt": "a", "code": "b"}, "has no 'code'"),
        ({"name": "x", "prompt": "a", "strip": 1}, "true or false"),
        ({"name": "x", "prompt": "{a.__class__}"}, "is no {field}"),
        ({"name": "x", "prompt": "{a!r}"}, "is no {field}"),
        ({"name": "x", "prompt": "{a:>99999999}"}, "is no {field}"),
        ({"name": "x", "prompt": "{0}"}, "is no {field}"),
        ({"name": "x", "prompt": "{}"}, "is no {field}"),
        ({"name": "x", "prompt": "}"}, "is no {field}"),
        ({"name": "x", "prompt": "a\0"}, "NUL"),
        ({"name": "x", "prompt": "a" * 200_000}, "characters, more than"),
        ({"name": "x", "prompt": "a", "turn": "{user}"}, "must hold {user} and {assistant}"),
    ],
)
def test_s10_stored_templates_are_read_strictly(data: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Template.from_dict(data, "adapter")
    assert message in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_template_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "prompt: |-\n  Do {instruction}\n  with {input} {{ok}}:\nprompt_without_input: 'Do {instruction}:'\n"
    )
    template = load_template(str(path), tokenizer)
    assert template.name == "mine"
    assert template.prompt_of({"instruction": "a", "input": "b"}) == "Do a\nwith b {ok}:"
    assert template.instruction_prompt("a") == "Do a:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: &a x\nprompt_without_input: *a\n", "anchors and aliases are not allowed (line 1)"),
        ("prompt: !!python/object/apply:os.system [x]\n", "tags are not allowed (line 1)"),
        ("prompt: !!str x\n", "tags are not allowed (line 1)"),
        ("prompt: a\nprompt: b\n", "appears twice"),
        ("prompt: [a]\n", "'prompt' of a template must be a text"),
        ("prompt: {a: b}\n", "'prompt' of a template must be a text"),
        ("- prompt\n", "is a map"),
        ("just text\n", "is a map"),
        ("", "has no 'prompt'"),
        ("prompt: null\n", "'prompt' of a template must be a text"),
        ("prompt: ~\n", "'prompt' of a template must be a text"),
        ("prompt:\nprompt_without_input: x\n", "'prompt' of a template must be a text"),
        ("promt: a\n", "no 'promt'"),
        ("name: a\nprompt: b\n", "no 'name'"),
        ("prompt: '{a.b}'\n", "is no {field}"),
        ("prompt: 'open\n", "not valid YAML"),
        ("prompt: a\n---\nprompt: b\n", "a second document (line 2)"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_s9_template_files_that_are_none(tmp_path: Path, text: str, message: str, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_template(str(path), tokenizer)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_null_in_a_template_file_is_no_text_and_quoted_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prompt: 'null'\nprompt_without_input: null\n")
    template = load_template(str(path), tokenizer)
    assert (template.prompt, template.prompt_without_input) == ("null", None)
    path.write_text("prompt: ''\n")
    assert load_template(str(path), tokenizer).prompt == ""
    path.write_text("prompt: 010\nbefore_completion: true\nturn: Null\n")
    template = load_template(str(path), tokenizer)
    assert (template.prompt, template.before_completion, template.turn) == ("010", "true", None)


def test_an_unknown_template_lists_the_known_ones(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        SpecError, match=r"no template 'alpacca': give a YAML file, a .jinja file or one of: alpaca, gsm8k, completion"
    ):
        load_template("alpacca", tokenizer)
    with pytest.raises(SpecError, match="a directory where a file is expected"):
        load_template(str(tmp_path), tokenizer)


def test_prompts_that_cannot_be_filled() -> None:
    with pytest.raises(DataError, match="no field 'input' for the template"):
        Template("x", "{instruction}{input}").prompt_of({"instruction": "a"})
    with pytest.raises(SpecError, match="no place for a prompt"):
        Template("x", "{a}{b}").instruction_prompt("a")
    assert Template("x", "<{topic}>").instruction_prompt("a") == "<a>"


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "completion"])
@pytest.mark.parametrize("text", ["a llama", " two\n\nparagraphs ", "{braces} \\d+ ### Input", "x"])
def test_the_fields_of_a_prompt_are_those_that_were_filled_in(name: str, text: str) -> None:
    template = TEMPLATES[name]
    for further in ("", "an\ninput"):
        fields = {field: further if field == "input" else text for field in template.placeholders}
        found = template.fields_of(template.prompt_of(fields))
        assert found == {field: filled for field, filled in fields.items() if filled}
    assert TEMPLATES["alpaca"].fields_of("Question: x\nAnswer:") is None
    assert Template("twice", "{a} and {a}").fields_of("x and x") == {"a": "x"}
    assert Template("twice", "{a} and {a}").fields_of("x and y") is None
    assert Template("bare", "Say it:").fields_of("Say it:") == {}
    assert Template("bare", "Say it:").fields_of("Say it: now") is None
