"""The label oracle: targets told from the bytes of the tokens alone, for random rows and conversations.

A row is written by hand here, as texts and special tokens; the bytes of its tokens, one after the other, must be the
bytes of these texts, and a token is a target if one of its bytes is an answer's.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from chat_tools import PARTS, conversation, encoded, random_text

from llamatune.data.chat_template import ChatTemplate, built_in_chat_template
from llamatune.data.segments import Segment, Segments
from llamatune.tokenizers.byte_level import bytes_of
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer
from llamatune.tokenizers.tokenizer_json import JsonTokenizer

Layout = list[tuple[str, bool]]
_PLAIN = [part for part in PARTS if part != "▁"]  # which SentencePiece takes for a space


def said_text(chance: random.Random) -> str:
    return random_text(chance, _PLAIN)


def bytes_of_token(tokenizer: Tokenizer, token: int) -> bytes:
    if isinstance(tokenizer, JsonTokenizer):
        return bytes_of(str(tokenizer._library.id_to_token(token)))
    piece = tokenizer.piece(token)
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def told(tokenizer: Tokenizer, ids: list[int], layout: Layout) -> list[int]:
    """The loss mask of ``ids``, whose texts and special tokens are ``layout``, each trained or not."""
    prefix = b"" if isinstance(tokenizer, JsonTokenizer) else b" "
    mask, left = list[int](), list(ids)
    while layout:
        if layout[0][0] in tokenizer.special_ids:
            assert left.pop(0) == tokenizer.special_ids[layout[0][0]]
            mask.append(int(layout.pop(0)[1]))
            continue
        run: Layout = []
        while layout and layout[0][0] not in tokenizer.special_ids:
            run.append(layout.pop(0))
        content = [(byte, trained) for text, trained in run for byte in text.encode()]
        if content:
            content = [(byte, content[0][1]) for byte in prefix] + content  # it stands where the first character does
        at = 0
        while at < len(content):
            token = bytes_of_token(tokenizer, left.pop(0))
            assert token == bytes(byte for byte, _ in content[at : at + len(token)])
            own = content[at : at + len(token)]
            own = own[1:] if at == 0 and prefix and len(own) > 1 else own
            mask.append(int(any(trained for _, trained in own)))
            at += len(token)
    assert not left
    return [0, *mask[1:]]  # nothing precedes the first token


def llama_2(said: list[tuple[str, str]]) -> Layout:
    made, opening = Layout(), ""
    for role, text in said:
        if role == "system":
            opening = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif role == "user":
            made += [("<s>", False), (f"[INST] {(opening + text).strip()} [/INST]", False)]
            opening = ""
        else:
            made += [(f" {text.strip()} ", True), ("</s>", True)]
    return made


def llama_3(said: list[tuple[str, str]]) -> Layout:
    made: Layout = [("<|begin_of_text|>", False)]
    for role, text in said:
        made += [("<|start_header_id|>", False), (role, False), ("<|end_header_id|>", False), ("\n\n", False)]
        made += [(text.strip(), role == "assistant"), ("<|eot_id|>", role == "assistant")]
    return made


def chatml(said: list[tuple[str, str]]) -> Layout:
    made: Layout = []
    for role, text in said:
        made += [("<|im_start|>", False), (f"{role}\n", False), (text, role == "assistant")]
        made += [("<|im_end|>", role == "assistant"), ("\n", False)]
    return made


BARE = (
    "{% for m in messages %}{{ '[' + m.content + ']' if m.role != 'assistant' else m.content + eos_token }}{% endfor %}"
)


def bare(said: list[tuple[str, str]]) -> Layout:
    """Nothing stands between a prompt and its answer, so that a byte of a character may be the first target."""
    made: Layout = []
    for role, text in said:
        made += [(text, True), ("</s>", True)] if role == "assistant" else [(f"[{text}]", False)]
    return made


LAYOUTS = {"llama2-chat": llama_2, "llama3-chat": llama_3, "chatml": chatml, "bare": bare}


def plain_row(tokenizer: Tokenizer, prompt: str, answer: str) -> Segments:
    eos = Segment(tokenizer.piece(tokenizer.eos_id), True, tokenizer.eos_id)
    return Segments((Segment(prompt), Segment(answer, True), eos))


def compare(tokenizer: Tokenizer, name: str, count: int, seed: int) -> None:
    own = ChatTemplate("bare", BARE, {"eos_token": "</s>"})
    chance, template = random.Random(seed), own if name == "bare" else built_in_chat_template(name, tokenizer)
    for _ in range(count):
        said = conversation(chance, said_text)
        ids, mask = encoded(template, tokenizer, said)
        assert told(tokenizer, ids, LAYOUTS[name]([(m["role"], m["content"]) for m in said])) == [0, *mask[1:]], said
        prompt, answer = ("" if chance.random() < 0.1 else said_text(chance)), said_text(chance)
        ids, spans = plain_row(tokenizer, prompt, answer).encode(tokenizer)
        bos = [] if tokenizer.bos_id is None else [(tokenizer.piece(tokenizer.bos_id), False)]
        layout = [*bos, (prompt, False), (answer, True), (tokenizer.piece(tokenizer.eos_id), True)]
        mask = [int(any(first <= n < last for first, last in spans)) for n in range(len(ids))]
        assert told(tokenizer, ids, layout) == [0, *mask[1:]], (prompt, answer)


@pytest.mark.parametrize(("name", "kind"), [("llama3-chat", "llama3"), ("chatml", "thinking")])
def test_targets_of_byte_level_tokens(chat_tokenizers: dict[str, Path], name: str, kind: str) -> None:
    compare(load_tokenizer(chat_tokenizers[kind]), name, 50, 11)


def test_targets_of_sentencepieces_tokens(tokenizer: Tokenizer) -> None:
    compare(tokenizer, "llama2-chat", 50, 12)
    compare(tokenizer, "bare", 50, 13)


@pytest.mark.slow
def test_three_thousand_rows_and_conversations(
    tokenizer: Tokenizer, chat_tokenizers: dict[str, Path], shared_fixtures: Path
) -> None:
    real = load_tokenizer(shared_fixtures / "data" / "llama2_tokenizer.model")
    cases = [(tokenizer, "llama2-chat"), (real, "llama2-chat"), (real, "bare")]
    cases += [(load_tokenizer(chat_tokenizers["llama3"]), "llama3-chat")]
    cases += [(load_tokenizer(chat_tokenizers["marked"]), "chatml")]
    for seed, (made, name) in enumerate(cases):
        compare(made, name, 600, 100 + seed)
