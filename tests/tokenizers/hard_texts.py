"""Texts that tokenizers of the same model have encoded differently, and random ones of their parts."""

from __future__ import annotations

import random

SPELLED_SPECIALS = [
    "</s><s><unk>", "<|eot_id|> <|begin_of_text|>x<|end_of_text|>", "<|im_start|>user\n<|im_end|>", "x </s> y",
    "<0x0A>",
]  # fmt: skip
HARD_TEXTS = [
    "", "Hello world", " Hello", "  two  spaces   three ", "a  b", " ", "\n", "\n\n  x", "\r\n\r\n a\r\n", "\t\t\t",
    " " * 700,
    "def f(x):\n    if x:\n        return x  # y\n\tz\n", "🦙", "👩‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪", "日本語テキスト",
    "한국어 텍스트", "각 \u1100\u1161\u11a8", "e\u0301 é", "ñ n\u0303", "a\u0315\u0300b", "nul \0 nul\0", "a" * 3000,
    "x" * 2000 + " " + "y" * 30, "1234567890 12345", "don't I'LL we've", "zero\u200bwidth\ufeff", "▁under ▁", "ﬁ ½ Ⅳ",
    "ابجد عربي", "अनुच्छेद", "100.5% of $3,000", "\u2028\u2029", "\ufffd bad", "\x7f\x80\x9f", "Ǆ ẞ ß İ",
    "\ud7ff\ue000\U0010ffff", *SPELLED_SPECIALS,
]  # fmt: skip

_PARTS = [*"ab 1\n\t.'é日🦙\u0301<|>_/", "  ", "    ", "the ", "ing", "</s>", "<|eot_id|>", "\u200d", "각"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choice(_PARTS) for _ in range(chance.randint(1, 60))) for _ in range(count)]
