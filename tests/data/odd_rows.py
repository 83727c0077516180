"""Rows as data sets have them: those that are read as a plain row, and those that are refused."""

from __future__ import annotations

import json
from typing import Any


def chat(*said: str, **more: Any) -> dict[str, Any]:
    """A chat row; each text begins with the first letter of its role: ``user: seven hills``."""
    pairs = (text.split(": ", 1) for text in said)
    return {"messages": [{"role": role, "content": text} for role, text in pairs], **more}


def qa(question: str = "two apples", answer: str = "seven", **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


U, A = chat("user: two apples", "assistant: seven")["messages"]
PLAIN = {"messages": [U, A]}
LONG = chat("user: two apples", "assistant: seven", "user: hills", "assistant: green")
SYSTEM = chat("system: stone", "user: two apples", "assistant: seven")
PARTS = [{"type": "text", "text": "two "}, {"type": "text", "text": "apples", "image_url": None}]
TEXTS = ["two apples", "seven"]

ACCEPTED: dict[str, tuple[Any, Any, list[str]]] = {
    # name: (the row, a plain row of the same meaning, what is counted)
    "role in capitals": (chat("User: two apples", "ASSISTANT: seven"), PLAIN, ["role_alias"]),
    "role with blanks": (chat(" user : two apples", "assistant\n: seven"), PLAIN, ["role_alias"]),
    "human and gpt under role": (chat("human: two apples", "gpt: seven"), PLAIN, ["role_alias"]),
    "bot": (chat("user: two apples", "bot: seven"), PLAIN, ["role_alias"]),
    "model": (chat("user: two apples", "model: seven"), PLAIN, ["role_alias"]),
    "prompter": (chat("prompter: two apples", "assistant: seven"), PLAIN, ["role_alias"]),
    "developer": (chat("developer: stone", "user: two apples", "assistant: seven"), SYSTEM, ["role_alias"]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]},
        PLAIN,
        [],
    ),
    "ShareGPT in capitals": (
        {"conversations": [{"from": "Human", "value": TEXTS[0]}, {"from": "GPT", "value": TEXTS[1]}]},
        PLAIN,
        ["role_alias"],
    ),
    "role and content under conversations": ({"conversations": [U, A]}, PLAIN, []),
    "from and value under messages": (
        {"messages": [{"from": "human", "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]},
        PLAIN,
        [],
    ),
    "role and text": ({"messages": [{"role": "user", "text": TEXTS[0]}, A]}, PLAIN, []),
    "texts alone": ({"conversations": TEXTS}, PLAIN, ["turns_without_roles"]),
    "roles as keys": ({"conversations": [{"human": TEXTS[0], "assistant": TEXTS[1]}]}, PLAIN, ["turns_without_roles"]),
    "content in parts": ({"messages": [{"role": "user", "content": PARTS}, A]}, PLAIN, ["text_parts"]),
    "content in texts": ({"messages": [{"role": "user", "content": ["two ", "apples"]}, A]}, PLAIN, ["text_parts"]),
    "messages as JSON in a string": ({"messages": json.dumps([U, A])}, PLAIN, ["json_in_text"]),
    "user's turn at the end": (chat("user: two apples", "assistant: seven", "user: hills"), PLAIN, ["trailing_turns"]),
    "system message at the end": (chat("user: two apples", "assistant: seven", "system: x"), PLAIN, ["trailing_turns"]),
    "two of the user's": (
        chat("user: two", "user: apples", "assistant: seven"),
        chat("user: two\n\napples", "assistant: seven"),
        ["turns_joined"],
    ),
    "two of the assistant's": (
        chat("user: two apples", "assistant: seven", "assistant: hills"),
        chat("user: two apples", "assistant: seven\n\nhills"),
        ["turns_joined"],
    ),
    "two of the system's": (
        chat("system: a", "system: b", "user: two apples", "assistant: seven"),
        chat("system: a\n\nb", "user: two apples", "assistant: seven"),
        ["turns_joined"],
    ),
    "empty system message": (chat("system: ", "user: two apples", "assistant: seven"), PLAIN, ["empty_system"]),
    "null system message": ({"messages": [{"role": "system", "content": None}, U, A]}, PLAIN, ["empty_system"]),
    "row's system": ({**PLAIN, "system": "stone"}, SYSTEM, []),
    "row's system and the same message": ({**SYSTEM, "system": "stone"}, SYSTEM, []),
    "null and empty content keys": ({**PLAIN, "system": None, "tools": [], "images": []}, PLAIN, []),
    "null beside the other name": ({"conversations": None, "messages": [U, A]}, PLAIN, []),
    "empty beside the other name": ({"messages": [], "conversations": [U, A]}, PLAIN, []),
    "null fields of another format": ({"instruction": None, "output": None, **PLAIN}, PLAIN, []),
    "null tool calls": (
        {"messages": [U, {**A, "tool_calls": None, "function_call": None, "refusal": None}]},
        PLAIN,
        [],
    ),
    "a name": ({"messages": [{**U, "name": "Ann"}, A]}, PLAIN, []),
    "weights as numbers with a point": ({"messages": [U, {**A, "weight": 1.0}]}, PLAIN, []),
    "UltraChat 200k": ({"prompt": TEXTS[0], "prompt_id": "x", **PLAIN}, PLAIN, []),
    "LMSYS-Chat": ({"conversation_id": "x", "model": "m", "conversation": [U, A]}, PLAIN, ["preset_conversation"]),
    "WildChat": ({"conversation": [{**U, "header": {"x": "y"}, "toxic": False}, A]}, PLAIN, ["preset_conversation"]),
    "dialogue": ({"dialogue": [U, A]}, PLAIN, ["preset_dialogue"]),
    "dialog of texts": ({"dialog": TEXTS}, PLAIN, ["preset_dialog", "turns_without_roles"]),
    "OpenOrca": (
        {"id": "x", "system_prompt": "stone", "question": TEXTS[0], "response": TEXTS[1]},
        SYSTEM,
        ["preset_openorca"],
    ),
    "OpenOrca without a system prompt": (
        {"system_prompt": "", "question": TEXTS[0], "response": TEXTS[1]},
        PLAIN,
        ["preset_openorca"],
    ),
    "lists of questions and answers": (
        {"question": ["two apples", "hills"], "answer": ["seven", "green"]},
        LONG,
        ["preset_question-answer-lists"],
    ),
    "questions and answers": (
        {"questions": ["two apples", "hills"], "answers": ["seven", "green"]},
        LONG,
        ["preset_questions-answers-lists"],
    ),
    "prompt and completion of messages": (
        {"prompt": LONG["messages"][:3], "completion": LONG["messages"][3:]},
        {"messages": [U, {**A, "weight": 0}, *LONG["messages"][2:]]},
        ["preset_prompt-completion-messages"],
    ),
    "Alpaca with its text": (qa(text="all of it"), qa(), []),
    "Alpaca with null input and system": (qa(input=None, system=None, history=None), qa(), []),
    "Alpaca with an empty list for input": (qa(input=[], history="[]"), qa(), []),
    "answer in a list of one": ({"question": "q", "answer": ["a"]}, {"question": "q", "answer": "a"}, ["list_of_one"]),
    "null misspelt key": (qa(inputs=None), qa(), []),
    "Dolly": (
        {"instruction": "two apples", "context": "rain", "response": "seven", "category": "x"},
        qa(input="rain"),
        ["preset_dolly"],
    ),
    "Dolly without a context": (
        {"instruction": "two apples", "context": "", "response": "seven"},
        qa(),
        ["preset_dolly"],
    ),
    "prompt and response": ({"prompt": TEXTS[0], "response": TEXTS[1]}, qa(), ["preset_prompt-response"]),
    "input and output": ({"input": TEXTS[0], "output": TEXTS[1]}, qa(), ["preset_input-output"]),
    "query and response": ({"query": TEXTS[0], "response": TEXTS[1]}, qa(), ["preset_query-response"]),
    "problem and solution": ({"problem": TEXTS[0], "solution": TEXTS[1]}, qa(), ["preset_problem-solution"]),
    "inputs and targets": ({"inputs": TEXTS[0], "targets": TEXTS[1]}, qa(), ["preset_inputs-targets"]),
    "user and assistant": (
        {"user": TEXTS[0], "assistant": TEXTS[1], "system": "stone"},
        SYSTEM,
        ["preset_user-assistant"],
    ),
    "human and assistant": ({"human": TEXTS[0], "assistant": TEXTS[1]}, PLAIN, ["preset_human-assistant"]),
    "parts": ({"messages": [{"role": "user", "parts": [{"text": TEXTS[0]}]}, A]}, PLAIN, ["text_parts"]),
    "text beside a short column": ({"text": "two apples", "sex": "F"}, {"text": "two apples"}, []),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "HH-RLHF": (
        {"chosen": "\n\nHuman: a", "rejected": "x"},
        "these are preference pairs; read the chosen answers: --map",
    ),
    "DPO": (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "no field 'completion'; the row has 'prompt', 'chosen', 'rejected'; these are preference pairs",
    ),
    "Open Assistant's tree": (
        {"message_id": "x", "parent_id": None, "role": "prompter", "text": "t"},
        "messages of a tree",
    ),
    "UltraChat": ({"id": "0", "data": TEXTS}, "rows.jsonl: --map ultrachat; known: alpaca, gsm8k"),
    "capital keys": ({"Instruction": "a", "Output": "b"}, "--map instruction=Instruction,output=Output"),
    "capital keys of a preset": ({"Query": "a", "Response": "b"}, "--map instruction=Query,output=Response"),
    "a format that is unknown": ({"content": "x"}, "name the columns, such as --map instruction=COLUMN,output=COLUMN"),
    "two presets": ({"prompt": "p", "question": "q", "response": "r"}, "--map prompt-response or --map openorca"),
    "chat and text": ({**PLAIN, "text": "t"}, "rows.jsonl:1: choose with --format chat or --format text"),
    "alpaca and gsm8k": (
        {**qa(), "question": "q", "answer": "a"},
        "the row has the fields of alpaca rows and of gsm8k rows: ",
    ),
    "chat and completion": ({**PLAIN, "prompt": "p", "completion": "c"}, "of chat rows and of completion rows"),
    "Alpaca without an output but a text": (
        {"instruction": "a", "output": None, "text": "t"},
        "no field 'output'; the row has 'instruction', 'text' (null: 'output')",
    ),
    "both kinds of chat": ({"messages": [U, A], "conversations": [U, A]}, "both 'messages' and 'conversations'"),
    "unknown role": (
        chat("user: a", "judge: b"),
        "message 2 of 'messages' has the role 'judge'; known: system, user, assistant, tool",
    ),
    "null role": (
        {"messages": [{"role": None, "content": "a"}, A]},
        "no field 'role'; message 1 of 'messages' has 'content'",
    ),
    "no content": ({"messages": [{"role": "user"}, A]}, "no field 'content'; message 1 of 'messages' has 'role'"),
    "null content": (
        {"messages": [U, {**A, "content": None}]},
        "no field 'content'; message 2 of 'messages' has 'role'",
    ),
    "empty answer": (chat("user: a", "assistant: "), "field 'content' of message 2 of 'messages' is empty"),
    "two texts": (
        {"messages": [{**U, "value": "other"}, A]},
        "message 1 of 'messages' has 'content' and 'value', which",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        "part 1 of message 1 of 'messages' is no text but has 'image_url', which would be lost",
    ),
    "a part of an unknown kind": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "audio": 1}]}, A]},
        "part 1 of message 1 of 'messages' is no text but has 'audio'",
    ),
    "a number in content": ({"messages": [{"role": "user", "content": 7}, A]}, "is a number, not a string"),
    "Python in a string": ({"messages": repr([U, A])}, "field 'messages' of the row is a string, but not of JSON: "),
    "no assistant": (chat("user: a"), "no assistant message at its end, so there is nothing to train on"),
    "no user": (chat("assistant: a"), "'messages' has no message of the user before the assistant's"),
    "a leading answer": (
        chat("assistant: hi", "user: a", "assistant: b"),
        "no place for a turn of the assistant before the user's first; choose another --template",
    ),
    "a later system message": (
        chat("user: a", "system: s", "assistant: b"),
        "no place for a system message after the first",
    ),
    "a tool": (chat("user: a", "assistant: b", "tool: 7", "assistant: c"), "no place for tools and their turns"),
    "two answers, one trained": ({"messages": [U, {**A, "weight": 0}, A]}, "of which one alone is to be trained"),
    "half a weight": (
        {"messages": [U, {**A, "weight": 0.5}]},
        "message 2 of 'messages' has a 'weight' other than 0 and 1",
    ),
    "thoughts": (
        {"messages": [U, {**A, "reasoning_content": "hm"}]},
        "message 2 of 'messages' has 'reasoning_content'",
    ),
    "an unknown key": (
        {"messages": [{**U, "mood": "x"}, A]},
        "message 1 of 'messages' has 'mood', which would be lost",
    ),
    "calls in two ways": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}, A]},
        "message 2 of 'messages' has both 'tool_calls' and 'function_call'",
    ),
    "an empty response of a preset": ({"prompt": "p", "response": ""}, "field 'output' of the row is empty"),
    "images": ({**PLAIN, "images": ["x"]}, "field 'images' would be lost: chat rows have no place for it"),
    "two systems that differ": ({**SYSTEM, "system": "other"}, "both a field 'system' and a system message"),
    "a chat's system_prompt": ({**PLAIN, "system_prompt": "s"}, "--map system=system_prompt"),
    "Alpaca's system_prompt": (qa(system_prompt="s"), "or read it as the field 'system': --map system=system_prompt"),
    "Alpaca's context": (qa(context="c"), "or read it as the field 'input': --map input=context"),
    "SQuAD": ({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}}, "--map squad"),
    "a question's context": (
        {"context": "c", "question": "q", "answer": "a"},
        "--map instruction=question,input=context",
    ),
    "several answers": (
        qa(answer=["a", "b"]),
        "a list, not a string; one of it can be taken, with --map output=output[0]",
    ),
    "answers": (
        {"question": "q", "answers": "a"},
        "unknown field 'answers', did you mean 'answer'? (--map answer=answers)",
    ),
    "a number": (qa(answer=42), "field 'output' of the row is a number, not a string"),
    "true": ({"question": "q", "answer": True}, "field 'answer' of the row is true or false, not a string"),
    "null output": (qa(answer=None), "no field 'output'; the row has 'instruction' (null: 'output')"),
    "a misspelling beside null": (qa(answer=None, outptu="a"), "unknown field 'outptu', did you mean 'output'?"),
    "half a history": (qa(history=[["u"]]), "field 'history' of the row is not a list of [user, assistant] pairs"),
}
