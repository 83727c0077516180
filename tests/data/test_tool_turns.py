"""Chats that are more than turns of user and assistant: in a chat template that has a place for them, or refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from chat_tools import random_text
from transformers import PreTrainedTokenizerFast

from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.chat_template import ChatTemplate, built_in_chat_template, variables_of
from llamatune.data.jinja_engine import Engine
from llamatune.data.raw_row import RowError
from llamatune.data.row_formats import FORMATS, prompt_row_of, row_of
from llamatune.data.templates import Template
from llamatune.errors import DataError
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

CALLING = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools:' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "  {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "  {%- if message.content %}{{- message.content }}{%- endif %}\n"
    "  {%- for call in message.tool_calls or [] %}{%- set function = call.function or call %}\n"
    "    {{- '\\n<call>' + function.name + ' ' + (function.arguments | tojson) + '</call>' }}\n"
    "  {%- endfor %}\n"
    "  {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ESCAPING = (
    "{{- bos_token }}{%- for message in messages %}\n"
    "  {%- if 'tool_calls' in message %}\n"
    "    {%- set function = message.tool_calls[0].function %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + (function | tojson(indent=1)) }}\n"
    "  {%- elif message.role == 'tool' %}\n"
    "    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + ({'output': message.content} | tojson) }}\n"
    "  {%- else %}\n"
    "    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}\n"
    "  {%- endif %}\n"
    "  {{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""As Llama 3.1's: what a tool says is written as JSON, and of a turn that calls tools nothing but the call."""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "rain", "description": "Tells of rain.", "parameters": {"properties": {"hill": {}}}},
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": {"hill": 'seven "é"', "days": 2}}}
ASKED = {"role": "user", "content": "Does it rain?"}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "name": "rain", "content": 'It "rains"\non 7 hills'}
ANSWER = {"role": "assistant", "content": "It rains."}
WHOLE = [{"role": "system", "content": "Be brief."}, ASKED, CALLS, TOLD, ANSWER]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": ASKED["content"]},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": TOLD["content"]},
    {"from": "gpt", "value": "It rains."},
]


@pytest.fixture(scope="module")
def smollm(chat_tokenizers: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(chat_tokenizers["smollm"])


def encoder_of(source: str, tokenizer: Tokenizer) -> ChatEncoder:
    """Of a template that is rendered in this process, which starts sooner than another one."""
    template = ChatTemplate("own", source, variables_of(tokenizer))
    vars(template)["engine"] = Engine(source, template.variables)
    return ChatEncoder(template, tokenizer)


def made(encoder: ChatEncoder, tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[list[int], list[str]]:
    """The ids of a row, and the texts of its targets."""
    read = row_of(row, FORMATS["chat"])
    ids, targets = encoder.row(read, read.completion, last_only=False).segments.encode(tokenizer)
    special = {number: text for text, number in tokenizer.special_ids.items()}
    return ids, ["".join(special.get(i) or tokenizer.decode([i]) for i in ids[a:b]) for a, b in targets]


@pytest.mark.parametrize(("kind", "source"), [("smollm", CALLING), ("llama3", ESCAPING)])
@pytest.mark.parametrize("with_tools", [True, False])
def test_ids_with_tools_are_those_of_transformers_and_the_answers_are_the_targets(
    chat_tokenizers: dict[str, Path], kind: str, source: str, with_tools: bool
) -> None:
    tokenizer, judge = (
        load_tokenizer(chat_tokenizers[kind]),
        PreTrainedTokenizerFast.from_pretrained(chat_tokenizers[kind]),
    )
    encoder = ChatEncoder(ChatTemplate("own", source, variables_of(tokenizer)), tokenizer)
    tools = TOOLS if with_tools else None
    row = {"messages": WHOLE, "tools": tools}
    if with_tools and kind == "llama3":
        with pytest.raises(RowError, match="leaves out the tools of the row; choose another --template"):
            made(encoder, tokenizer, row)
        return
    judge.chat_template = source
    ids, targets = made(encoder, tokenizer, row)
    assert ids == judge.apply_chat_template(WHOLE, tools=tools, return_dict=True)["input_ids"]
    end = "<|im_end|>" if kind == "smollm" else "<|eot_id|>"
    assert len(targets) == 2
    assert '{"hill": ' in targets[0] or '"hill": ' in targets[0]
    assert targets[0].endswith(end)
    assert targets[1] == f"It rains.{end}"
    prompt = encoder.prompt(WHOLE[:-1], None, tools or (), odd=True).encode(tokenizer)[0]
    given = judge.apply_chat_template(WHOLE[:-1], tools=tools, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert prompt == given == ids[: len(given)]


def test_ids_of_random_conversations_with_tools_are_those_of_transformers(
    chat_tokenizers: dict[str, Path], smollm: Tokenizer
) -> None:
    judge, chance = PreTrainedTokenizerFast.from_pretrained(chat_tokenizers["smollm"]), random.Random(14)
    judge.chat_template, encoder = CALLING, encoder_of(CALLING, smollm)
    for _ in range(40):
        said = [{"role": "assistant", "content": random_text(chance)}] * chance.randint(0, 1)
        for _ in range(chance.randint(1, 3)):
            said.append({"role": "user", "content": random_text(chance)})
            for _ in range(chance.randint(0, 2)):
                arguments = {random_text(chance): random_text(chance), "n": chance.randint(0, 99)}
                call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
                said.append({"role": "assistant", "tool_calls": [call] * chance.randint(1, 2)})
                said += [{"role": "tool", "content": random_text(chance)}] * chance.randint(1, 2)
            said.append({"role": "assistant", "content": random_text(chance)})
            said += [{"role": "system", "content": random_text(chance)}] * chance.randint(0, 1)
        while said[-1]["role"] == "system":
            said.pop()
        tools = TOOLS * chance.randint(0, 2)
        ids, targets = made(encoder, smollm, {"messages": said, "tools": tools})
        assert ids == judge.apply_chat_template(said, tools=tools or None, return_dict=True)["input_ids"]
        answers = said[1:] if said[0]["role"] == "assistant" else said
        assert len(targets) == sum(message["role"] == "assistant" for message in answers)


@pytest.mark.parametrize(
    ("row", "adjusted"),
    [
        ({"messages": WHOLE, "tools": json.dumps(TOOLS)}, {"tools", "json_in_text"}),
        (
            {"messages": [*WHOLE[:2], {**CALLS, "tool_calls": [{**CALL, "function": {**CALL["function"],
             "arguments": json.dumps(CALL["function"]["arguments"])}}]}, *WHOLE[3:]], "tools": TOOLS},
            {"tools", "json_in_text"},
        ),
        (
            {"messages": [*WHOLE[:2], {**CALLS, "content": None, "tool_calls": json.dumps([CALL])}, *WHOLE[3:]],
             "tools": TOOLS},
            {"tools", "json_in_text"},
        ),
        (
            {"messages": [*WHOLE[:2], {"role": "assistant", "content": "", "function_call": CALL["function"]},
             {**TOLD, "role": "function"}, ANSWER], "tools": TOOLS},
            {"tools", "function_call", "role_alias"},
        ),
        ({"conversations": SHAREGPT, "tools": json.dumps(TOOLS)}, {"tools", "json_in_text"}),
        ({"conversations": [*SHAREGPT, {"from": "human", "value": "?"}], "tools": TOOLS}, {"tools", "trailing_turns"}),
    ],
)  # fmt: skip
def test_tool_turns_in_every_form(smollm: Tokenizer, row: dict[str, Any], adjusted: set[str]) -> None:
    encoder = encoder_of(CALLING, smollm)
    assert made(encoder, smollm, row) == made(encoder, smollm, {"messages": WHOLE, "tools": TOOLS})
    assert set(row_of(row, FORMATS["chat"]).adjusted) == adjusted


def test_a_turn_that_only_calls_has_an_empty_content_which_some_templates_need(smollm: Tokenizer) -> None:
    source = CALLING.replace(
        "{%- if message.content %}{{- message.content }}{%- endif %}", "{{- message.content.strip() }}"
    )
    assert source != CALLING
    for calls in (CALLS, {**CALLS, "content": None}, {**CALLS, "content": ""}):
        row = {"messages": [ASKED, calls, TOLD, ANSWER]}
        assert made(encoder_of(source, smollm), smollm, row) == made(encoder_of(CALLING, smollm), smollm, row)


def test_a_call_may_be_the_answer(smollm: Tokenizer) -> None:
    encoder = encoder_of(CALLING, smollm)
    _, targets = made(encoder, smollm, {"messages": WHOLE[:3], "tools": TOOLS})
    assert len(targets) == 1
    assert targets[0].startswith("\n<call>rain ")
    text, _ = made(encoder, smollm, {"messages": [ASKED, {**CALLS, "content": "I look."}]})
    assert "I look." in smollm.decode(text)


@pytest.mark.parametrize(
    ("part", "changed", "messages", "lost"),
    [
        ("in messages", "in messages if message.role != 'user'", WHOLE, "user's text of message 2"),
        ("function.name", "'x'", WHOLE, "tool calls of message 3"),
        ("message.tool_calls or []", "[]", [{**ASKED, "content": str(CALL)}, *WHOLE[2:]], "tool calls of message 2"),
        ("message.content %}", "message.content and message.role != 'tool' %}", WHOLE, "tool's text of message 4"),
        ("in messages", "in messages if message.role != 'tool'", [{**ASKED, "content": TOLD["content"]}, *WHOLE[2:]],
         "tool's text of message 3"),
        ("message.content %}", "message.content and not message.tool_calls %}",
         [ASKED, {**CALLS, "content": "I look."}, TOLD, ANSWER], "assistant's text of message 2"),
        ("in messages", "in messages[1:]", [ANSWER, ASKED, ANSWER], "assistant's text of message 1"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_an_error(
    smollm: Tokenizer, part: str, changed: str, messages: list[Any], lost: str
) -> None:
    assert part in CALLING
    encoder = encoder_of(CALLING.replace(part, changed), smollm)
    with pytest.raises(RowError, match=f"the chat template leaves out the {lost}"):
        made(encoder, smollm, {"messages": messages})
    with pytest.raises(DataError, match="prompt 1"):
        PromptEncoder(smollm, encoder.template).segments(prompt_row_of({"messages": messages[:-1]}), 1)


def test_special_tokens_in_calls_and_tools_stay_text(smollm: Tokenizer) -> None:
    encoder = encoder_of(CALLING, smollm)
    text = json.dumps({"messages": WHOLE, "tools": TOOLS})
    plain, _ = made(encoder, smollm, json.loads(text))
    attack = text.replace("hill", "<|im_end|>").replace("Tells of", "<|im_start|>").replace("7 ", "<|im_end|>")
    ids, targets = made(encoder, smollm, json.loads(attack))
    specials = set(smollm.special_ids.values())
    assert [i for i in ids if i in specials] == [i for i in plain if i in specials]
    assert smollm.decode(ids).count("<|im_end|>") == 4
    assert targets[0].count("<|im_end|>") == 2


def test_turns_beyond_user_and_assistant_are_context(smollm: Tokenizer) -> None:
    encoder, end = ChatEncoder(built_in_chat_template("chatml", smollm), smollm), "<|im_end|>"
    greeting = [{"role": "assistant", "content": "Hello."}, ASKED, ANSWER]
    later = [ASKED, ANSWER, {"role": "system", "content": "Be brief."}, ASKED, ANSWER]
    told = [ASKED, ANSWER, {"role": "tool", "content": "7"}, ANSWER]
    for messages, texts in ((greeting, 1), (later, 2), (told, 2)):
        ids, targets = made(encoder, smollm, {"messages": messages})
        assert targets == [f"It rains.{end}"] * texts
        shown = "".join(f"<|im_start|>{message['role']}\n{message['content']}{end}\n" for message in messages)
        assert ids == smollm.encode_mixed([(part, smollm.special_ids.get(part)) for part in _parts(shown)])[0]
    assert row_of({"messages": greeting}, FORMATS["chat"]).adjusted == ("leading_assistant",)
    assert row_of({"messages": later}, FORMATS["chat"]).adjusted == ("later_system",)


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"(<\|im_(?:start|end)\|>)", text) if part]


def test_built_in_templates_have_no_place_for_calls(smollm: Tokenizer) -> None:
    encoder = ChatEncoder(built_in_chat_template("chatml", smollm), smollm)
    for row in ({"messages": WHOLE}, {"messages": [ASKED, ANSWER], "tools": TOOLS}, {"messages": [ASKED, CALLS]}):
        with pytest.raises(
            RowError, match="'chatml' has no place for tools and their turns; choose another --template"
        ):
            made(encoder, smollm, row)


@pytest.mark.parametrize(
    "messages", [WHOLE, [ANSWER, ASKED, ANSWER], [ASKED, {"role": "system", "content": "s"}, ANSWER]]
)
def test_a_template_without_a_place_refuses_them_by_name(tokenizer: Tokenizer, messages: list[Any]) -> None:
    row = row_of({"messages": messages}, FORMATS["chat"])
    named = "no place for (tools and their turns|a turn of the assistant before|a system message after)"
    own = Template("own", "{user}", turn="{user} {assistant}", system="{system} {user}")
    assert row.irregular is not None
    assert row.irregular.what in (own.misfit(row) or "")
    llama_2 = built_in_chat_template("llama2-chat", tokenizer)
    with pytest.raises(RowError, match=f"the template 'llama2-chat' has {named}.*; choose another"):
        ChatEncoder(llama_2, tokenizer).row(row, row.completion, last_only=False)
    for template in (own, llama_2):
        with pytest.raises(DataError, match=f"{named}.*prompt 1"):
            PromptEncoder(tokenizer, template).segments(prompt_row_of({"messages": messages[:-1]}), 1)


def test_tools_prompt_as_they_train(smollm: Tokenizer) -> None:
    template = encoder_of(CALLING, smollm).template
    row = {"messages": WHOLE, "tools": TOOLS}
    ids, _ = made(ChatEncoder(template, smollm), smollm, row)
    for messages in (WHOLE, WHOLE[:-1]):
        prompt = PromptEncoder(smollm, template).segments(prompt_row_of({**row, "messages": messages}), 1)
        asked = prompt.encode(smollm)[0]
        assert ids[: len(asked)] == asked
        assert smollm.decode(asked).endswith("assistant\n")
