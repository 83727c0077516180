"""Random rows of every format, well and badly made, in which every text holds a word that no other has."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

EXTRA = [
    "tools", "functions", "images", "image", "system_prompt", "system", "history", "context", "id", "label", "source",
    "metadata", "Instruction", "ouput", "conversation", "messages", "conversations", "weight", "train", "text",
    "prompt", "completion", "question", "answer", "input", "instruction", "output", "response", "title", "content",
    "tool_calls", "function_call", "name", "reasoning_content", "chosen", "rejected", "lang", "category", "turns",
]  # fmt: skip
ROLES = [
    "user", "assistant", "system", "human", "gpt", "bot", "model", "developer", "tool", "function", "User", " user",
    "ASSISTANT", "observation", "function_call", "ipython", "chatgpt", "narrator", "", "moderator",
]  # fmt: skip
LINES = [
    b"", b"   ", b"[]", b"{}", b"null", b"7", b'"text"', b"{'prompt': 'a', 'completion': 'b'}", b'{"prompt": "a",}',
    b'{"prompt": NaN, "completion": "b"}', b'{"prompt": "\\ud800", "completion": "b"}', b"\xff\xfe{}", b"// remark",
    b'{"prompt": "a\\u0000", "completion": "b"}', b'{"text": "a", "text": "b"}', b'{"text": "\xc3("}',
    b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", b'{"text": ' + b"9" * 5000 + b"}", b"<html>",
    b'{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}', b"\x00", b"a,b", b"\xef\xbb\xbf",
]  # fmt: skip
"""Lines that hold no row, or none that can be used."""


class Rows:
    """Random rows; ``chance`` decides all of them."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self._numbers = chance, itertools.count()

    def text(self) -> str:
        """A text with a word of its own."""
        chance = self.chance
        around = ["", " ", "\n", "é", "日本", "a: ", ".", "\t", "'s ", "</s> ", "[INST] "]
        return f"{chance.choice(around)}zq{next(self._numbers)}x{chance.choice(around)}"

    def value(self) -> Any:
        chance, text = self.chance, self.text
        return chance.choice([
            text, lambda: None, lambda: "", lambda: " \n", list, dict, lambda: "[]", lambda: "{}", lambda: 0,
            lambda: 1, lambda: 0.5, lambda: True, lambda: False, lambda: [text()], lambda: {"text": text()},
            lambda: [{"type": "text", "text": text()}], lambda: [{"type": "image", "url": text()}],
            lambda: [[text(), text()]], lambda: [{"role": "user", "content": text()}], lambda: json.dumps([text()]),
            lambda: 10**30, lambda: -0.0, lambda: [None], lambda: [{"from": "human", "value": text()}],
        ])()  # fmt: skip

    def chat(self, weights: bool) -> list[Row]:
        """Well-made messages, some of which say whether they are trained."""
        said: list[Row] = [
            {"role": role, "content": self.text()} for role in ["user", "assistant"] * self.chance.randint(1, 3)
        ]
        for message in said[1::2]:
            if weights and self.chance.random() < 0.5:
                message["weight"] = self.chance.choice([0, 1])
        return said

    def messages(self, sharegpt: bool) -> list[Row]:
        chance = self.chance
        said = ["system"] * (chance.random() < 0.4) + ["user", "assistant"] * chance.randint(1, 3)
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        made: list[Row] = []
        for role in said:
            made.append(
                {"from": names[role], "value": self.text()} if sharegpt else {"role": role, "content": self.text()}
            )
        while chance.random() < 0.35:
            place = chance.randrange(len(made))
            match chance.randrange(9):
                case 0:
                    made.insert(place, dict(made[place]))
                case 1:
                    del made[place]
                case 2:
                    made[place][chance.choice([*made[place], *EXTRA])] = self.value()
                case 3:
                    made[place]["from" if sharegpt else "role"] = chance.choice(ROLES)
                case 4:
                    made.insert(chance.randint(0, len(made)), {"role": chance.choice(ROLES), "content": self.text()})
                case 5:
                    made[place][chance.choice(["weight", "train"])] = chance.choice([0, 1, False, True, 0.5, "0", None])
                case 6:
                    made[place]["value" if sharegpt else "content"] = self.value()
                case 7:
                    made[place].pop(chance.choice(list(made[place])))
                case _:
                    made[place]["content"] = [{"type": "text", "text": self.text()} for _ in range(2)]
            if not made or not all(made):
                break
        return made

    def well_made(self) -> Row:
        chance, text = self.chance, self.text
        match chance.randrange(6):
            case 0:
                row = {"instruction": text(), "output": text()}
                return row | ({"input": chance.choice([text(), "", None])} if chance.random() < 0.6 else {})
            case 1:
                return {"question": text(), "answer": text()}
            case 2:
                return {"prompt": text(), "completion": text()}
            case 3:
                return {"text": text()}
            case 4:
                return {"messages": self.messages(False)}
            case _:
                return {"conversations": self.messages(True)}

    def row(self) -> Row:
        """A well-made row with a few changes, or none."""
        chance, row = self.chance, self.well_made()
        while row and chance.random() < 0.45:
            key = chance.choice(list(row))
            match chance.randrange(8):
                case 0:
                    del row[key]
                case 1:
                    row[key] = self.value()
                case 2:
                    row[chance.choice([key.upper(), key.title(), key[:-1], f"{key}s", f" {key}", key[::-1]])] = row.pop(
                        key
                    )
                case 3:
                    row[key] = json.dumps(row[key]) if isinstance(row[key], list) else [row[key]]
                case 4:
                    row |= self.well_made()
                case 5:
                    row["history"] = [[self.text(), self.text()]]
                    row["system"] = self.text()
                case _:
                    row[chance.choice(EXTRA)] = self.value()
        return row

    def line(self) -> bytes:
        if self.chance.random() < 0.1:
            return self.chance.choice(LINES)
        return json.dumps(self.row(), ensure_ascii=self.chance.random() < 0.5).encode()


def words(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of a row that hold a word of their own, with the keys that lead there."""
    if isinstance(value, str):
        for part in value.split("zq")[1:]:
            yield path, "zq" + part.split("x")[0] + "x"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from words(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from words(inner, path)
