"""Random rows and conversations, each with the parts that it must be made of (``None``: it must be refused)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from label_oracle import Part, Parts

Made = tuple[dict[str, Any], Parts | None]

TEXTS = [
    "llama", "stone ", " seven", "walks over", "Response", "the", "a", "'s", "7", "12345", ".", ":", "://", "(x)", "#",
    "-", " ", "  ", "     ", "\n", "\n\n", "\n  ", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", "é", "e\u0301",
    "\u0301", "a\u0315\u0300", "각", "\u1100\u1161\u11a8", "日本", "ابجد", "अनु", "ﬁ", "½", "ẞ", "▁", "\u200d", "\ufeff",
    "\ufffd", "\U0001f999", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "\U00013000", "\U0010ffff", "\x07", "\x7f", "\x85",
    "<0x0A>", "{instruction}", "{{ x }}", "{% raw %}", "<<48/2=24>>", "#### 24", "### Response:", "<think>", "<tool>",
]  # fmt: skip
SPELLED = [
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", " [/INST] ", "<<SYS>>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|im_start|>", "<|im_end|>\n",
]  # fmt: skip
"""What a template writes, here as the text of a row."""
BLANKS = ["", " ", "\n", "\t \n", "\u00a0", "\u3000"]


def random_text(chance: random.Random, parts: Sequence[str] = (*TEXTS, *SPELLED)) -> str:
    while True:
        some = chance.choices(parts, k=chance.randint(1, 9))
        if chance.random() < 0.2:
            some.insert(chance.randint(0, len(some)), random_character(chance))
        if text := "".join(some).strip() and "".join(some):
            return text


def random_character(chance: random.Random) -> str:
    while True:
        number = chance.randint(1, chance.choice((0x7FF, 0xFFFF, 0x10FFFF)))
        if not 0xD800 <= number <= 0xDFFF:
            return chr(number)


class Turn(NamedTuple):
    """A message, and whether it is trained."""

    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Case:
    """A kind of row for a kind of tokenizer, with options of ``prepare-data``."""

    tokenizer: str
    make: Callable[[random.Random, Case], Made]
    template: str | None = None
    file: str = ""
    """The source of ``template``, if that is a file."""
    options: dict[str, Any] = field(default_factory=dict)
    layout: Callable[[list[Turn], bool], Parts] | None = None

    @property
    def on_prompt(self) -> bool:
        return bool(self.options.get("train_on_prompt"))

    @property
    def ends(self) -> tuple[list[Part], list[Part]]:
        """BOS and EOS of a row that is no chat."""
        bos, eos = {
            "llama2": ("<s>", "</s>"), "bpe": ("<s>", "</s>"), "llama_3": ("<|begin_of_text|>", "<|eot_id|>"),
            "merging": ("<|begin_of_text|>", "<|eot_id|>"), "composing": ("", "<|eot_id|>"),
        }[self.tokenizer]  # fmt: skip
        return [Part(bos, False, True)] if bos else [], [Part(eos, True, True)]

    def row_of(self, prompt: str, answer: str) -> Parts:
        bos, eos = self.ends
        return [*bos, *apart(prompt, self.on_prompt, answer, True), *eos]


def apart(prompt: str, on_prompt: bool, answer: str, trained: bool) -> list[Part]:
    """A prompt and its answer, to which the blanks at the prompt's end belong; a line break is the prompt's."""
    asked = re.sub(r"[^\S\r\n]+\Z", "", prompt)
    return [Part(asked, on_prompt), Part(prompt[len(asked) :] + answer, trained, answer=True)]


def blank(chance: random.Random, *texts: str) -> tuple[list[str], bool]:
    """``texts``, of which rarely one is made blank, and whether one was."""
    made, spoilt = list(texts), chance.random() < 0.03
    if spoilt:
        made[chance.randrange(len(made))] = chance.choice(BLANKS)
    return made, spoilt


# Rows of a prompt and an answer.

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


def completion(chance: random.Random, case: Case) -> Made:
    (prompt, answer), spoilt = blank(chance, random_text(chance), random_text(chance))
    return {"prompt": prompt, "completion": answer}, None if spoilt else case.row_of(prompt, answer)


def gsm8k(chance: random.Random, case: Case) -> Made:
    (question, answer), spoilt = blank(chance, random_text(chance), random_text(chance))
    parts = case.row_of(f"Question: {question}\nAnswer:", answer)
    return {"question": question, "answer": answer}, None if spoilt else parts


def text(chance: random.Random, case: Case) -> Made:
    (whole,), spoilt = blank(chance, random_text(chance))
    return {"text": whole}, None if spoilt else case.row_of("", whole)


def alpaca(chance: random.Random, case: Case) -> Made:
    (instruction, answer), spoilt = blank(chance, random_text(chance), random_text(chance))
    row: dict[str, Any] = {"instruction": instruction, "output": answer}
    made = ALPACA_WITHOUT_INPUT.format(instruction)
    if chance.random() < 0.7:
        row["input"] = chance.choice([random_text(chance), "", None])
        made = ALPACA.format(instruction, row["input"]) if row["input"] else made
    return row, None if spoilt else case.row_of(made, answer)


OWN = 'prompt: "Q: {instruction}%s"\nbefore_completion: "%s"\n'


def own(end: str, before: str = "") -> Callable[[random.Random, Case], Made]:
    """Alpaca rows in a template that ends in ``end``."""

    def make(chance: random.Random, case: Case) -> Made:
        (instruction, answer), spoilt = blank(chance, random_text(chance), random_text(chance))
        parts = case.row_of(f"Q: {instruction}{end}", before + answer)
        return {"instruction": instruction, "output": answer}, None if spoilt else parts

    return make


TURNS = (
    'prompt: "Q: {user}\\nA:"\nturn: "Q: {user}\\nA: {assistant}\\n"\nsystem: "({system}) {user}"\n'
    'before_completion: " "\n'
)


def turns(said: list[Turn], on_prompt: bool) -> Parts:
    """A chat in a template of prompts, which trains the last answer alone."""
    opening, made = "", ""
    *earlier, user, answer = said
    if earlier and earlier[0].role == "system":
        opening = f"({earlier.pop(0).text}) "
    for turn in earlier:
        made += f"Q: {opening}{turn.text}\nA: " if turn.role == "user" else f"{turn.text}\n"
        opening = "" if turn.role == "user" else opening
    ends = [Part("</s>", answer.trained, True)]
    asked = f"{made}Q: {opening}{user.text}\nA:"
    return [Part("<s>", False, True), *apart(asked, on_prompt, f" {answer.text}", answer.trained), *ends]


# Chats.


def chat(chance: random.Random, case: Case) -> Made:
    said = [Turn("system", random_text(chance), case.on_prompt)] * (chance.random() < 0.4)
    for _ in range(chance.randint(1, 4)):
        said += [Turn("user", random_text(chance), case.on_prompt), Turn("assistant", random_text(chance), True)]
    spoilt = chance.random() < 0.03
    if spoilt:
        place = chance.randrange(len(said) - 2, len(said))
        said[place] = said[place]._replace(text=chance.choice(BLANKS))
    last_only = case.options.get("train_on") == "last-assistant"
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(said):
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.role == "assistant" and chance.random() < 0.3:
            message |= chance.choice([{"weight": 0}, {"train": False}, {"weight": 1}, {"train": True}, {"weight": 0.0}])
            said[number] = turn._replace(trained=bool(message.get("weight", message.get("train"))))
        if turn.role == "assistant" and last_only and number < len(said) - 1:
            said[number] = turn._replace(trained=False)
        messages.append(message)
    row: dict[str, Any] = {}
    if said[0].role == "system" and chance.random() < 0.5:
        row["system"] = messages.pop(0)["content"]
    if chance.random() < 0.3:
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        row["conversations"] = [
            {"from": names[message.pop("role")], "value": message.pop("content"), **message} for message in messages
        ]
    else:
        row["messages"] = messages
    assert case.layout is not None
    return row, None if spoilt else case.layout(said, case.on_prompt)


def instructions(chance: random.Random, case: Case) -> Made:
    """Alpaca rows as conversations."""
    (instruction, answer), spoilt = blank(chance, random_text(chance), random_text(chance))
    row: dict[str, Any] = {"instruction": instruction, "output": answer}
    asked, said = instruction, list[Turn]()
    if chance.random() < 0.5:
        row["input"] = random_text(chance)
        asked = f"{instruction}\n\n{row['input']}"
    if chance.random() < 0.5:
        row["system"] = random_text(chance)
        said.append(Turn("system", row["system"], case.on_prompt))
    if chance.random() < 0.5:
        row["history"] = [[random_text(chance), random_text(chance)]]
        said += [Turn("user", row["history"][0][0], case.on_prompt), Turn("assistant", row["history"][0][1], True)]
    said += [Turn("user", asked, case.on_prompt), Turn("assistant", answer, True)]
    assert case.layout is not None
    return row, None if spoilt else case.layout(said, case.on_prompt)


def llama_2(said: list[Turn], on_prompt: bool) -> Parts:
    made, opening = list[Part](), ""
    for role, content, trained in said:
        if role == "system":
            opening = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            text = f"[INST] {(opening + content).strip()} [/INST]"
            made += [Part("<s>", on_prompt, True), Part(text, on_prompt)]
            opening = ""
        else:
            made += [Part(f" {content.strip()} ", trained, answer=True), Part("</s>", trained, True)]
    return made


def llama_3(said: list[Turn], on_prompt: bool) -> Parts:
    made = [Part("<|begin_of_text|>", False, True)]
    for role, content, trained in said:
        made += [Part("<|start_header_id|>", on_prompt, True), Part(role, on_prompt)]
        made += [Part("<|end_header_id|>", on_prompt, True), Part("\n\n", on_prompt)]
        made += [Part(content.strip(), trained, answer=role == "assistant"), Part("<|eot_id|>", trained, True)]
    return made


def chatml(said: list[Turn], on_prompt: bool) -> Parts:
    made = list[Part]()
    for role, content, trained in said:
        made += [Part("<|im_start|>", on_prompt, True), Part(f"{role}\n", on_prompt)]
        made += [
            Part(content, trained, answer=role == "assistant"),
            Part("<|im_end|>", trained, True),
            Part("\n", on_prompt),
        ]
    return made


def chatml_after_bos(said: list[Turn], on_prompt: bool) -> Parts:
    return [Part("<|begin_of_text|>", False, True), *chatml(said, on_prompt)]


BARE = (
    "{% for m in messages %}{{ '[' + m.content + ']' if m.role != 'assistant' else m.content + eos_token }}{% endfor %}"
)


def bare(said: list[Turn], on_prompt: bool) -> Parts:
    """Nothing stands between a question and its answer, so that a byte of a character may be the first target."""
    made = list[Part]()
    for role, content, trained in said:
        answer = [Part(content, trained, answer=True), Part("</s>", trained, True)]
        made += answer if role == "assistant" else [Part(f"[{content}]", on_prompt)]
    return made


SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[Q] ' + m.content + ' [A]: ' }}"
    "{% else %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endif %}{% endfor %}"
)


def spaced(said: list[Turn], on_prompt: bool) -> Parts:
    """The prompt ends in a blank, which is part of it as it is in what others generate from."""
    made, before = list[Part](), ""
    for role, content, trained in said:
        if role == "assistant":
            made += [Part(before, on_prompt), Part(content, trained, answer=True), Part("</s>", trained, True)]
            before = ""
        else:
            before += content if role == "system" else f"[Q] {content} [A]: "
    return made
