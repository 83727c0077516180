"""Merged directories opened by other programs, each in an environment of its own: the same model, tokens and chats."""

from __future__ import annotations

import re

import pytest
from asking import JUDGES
from bases import BARE, OUTPUTS
from computing import CHATS, without_end, worst_difference
from hard_texts import HARD_TEXTS
from transformers import AutoTokenizer

from llamatune.tokenizers.loading import load_tokenizer

pytestmark = pytest.mark.interop
_WINDOW = "mlx-lm computes a Mistral without its window"
_DYNAMIC = "with dynamic scaling mlx-lm continues a text otherwise than it reads one"
_NO_WINDOW = "llama.cpp computes a Mistral without its window"
_NO_SPACE = "without a tokenizer.json, transformers 5.23 puts no space before a Mistral's text"
OTHERWISE = {
    "test_logits_are_the_same[mlx: mistral]": _WINDOW,
    "test_greedy_tokens_are_the_same[mlx: mistral]": _WINDOW,
    "test_greedy_tokens_are_the_same[mlx: dynamic]": _DYNAMIC,
    "test_logits_are_the_same[llama.cpp: mistral]": _NO_WINDOW,
    "test_greedy_tokens_are_the_same[llama.cpp: mistral]": _NO_WINDOW,
    "test_texts_have_the_same_ids[transformers5: mistral]": _NO_SPACE,
}
"""What other programs do otherwise, with the base too; a test that passes all the same fails, so that it is noticed."""
SPACES = re.compile("^[ ▁]|  ")
"""transformers 5 splits these unlike SentencePiece, where ``tokenizer_class`` is ``LlamaTokenizer``."""


@pytest.fixture(params=[(judge, name) for judge in JUDGES for name in OUTPUTS], ids=lambda pair: ": ".join(pair))
def asked(request, answers, outputs):
    """A judge's name, its answer about an output, that output, and its name."""
    judge, name = request.param
    known = answers(judge)
    if name not in known:
        pytest.skip(f"{judge} is not asked about {name}")
    if request.node.name in OTHERWISE:
        request.node.add_marker(pytest.mark.xfail(reason=OTHERWISE[request.node.name], strict=True))
    return judge, known[name], outputs[name], name


def test_logits_are_the_same(asked, note):
    judge, answer, output, name = asked
    worst = worst_difference(answer, output.computed)
    note(f"{judge} {answer['release']}: {name}", worst)
    assert worst < 1e-4


def test_theta_is_the_same(asked):
    _, answer, output, _ = asked
    assert answer["theta"] == output.computed.theta


def test_greedy_tokens_are_the_same(asked):
    """Up to an EOS, at which all stop."""
    _, answer, output, _ = asked
    assert [without_end(row, output.computed) for row in answer["greedy"]] == output.computed.greedy


def test_texts_have_the_same_ids(asked):
    judge, answer, output, name = asked
    if name in BARE:
        pytest.skip("without a tokenizer")
    tokenizer = load_tokenizer(output.path)
    differ = [text for text, ids in zip(HARD_TEXTS, answer["texts"], strict=True) if ids != tokenizer.encode(text)]
    if judge in ("transformers5", "mlx") and (output.path / "tokenizer.model").exists():
        differ = [text for text in differ if not SPACES.search(text)]
    assert differ == [], f"{len(differ)} of {len(HARD_TEXTS)}"


def test_chats_are_rendered_the_same(asked):
    _, answer, output, name = asked
    if name.endswith("of Meta") or name in BARE:
        pytest.skip("without a chat template")
    base = AutoTokenizer.from_pretrained(output.base)
    expected = [
        base.apply_chat_template(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] != "assistant")
        for chat in CHATS
    ]
    assert answer["chats"] == expected
