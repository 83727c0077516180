"""Overlap of rows against brute force, rank against the decomposition of the whole product."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.checkpoints.adapter import load_adapter
from llamatune.data.batches import open_prepared
from llamatune.judging.overlap import JudgedRows, N, find_overlaps, prepared_rows, words_of
from llamatune.judging.rank_used import effective_rank, rank_use, singular_values
from llamatune.tokenizers.loading import load_tokenizer


def prepared_of(prepared: Callable[..., Path], tmp_path: Path, texts: list[str]) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepared(rows, format="text", max_seq_length=400)


def test_a_row_overlaps_where_thirteen_words_in_a_row_are_a_training_rows(
    prepared: Callable[..., Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    template = "stones old seven on falls rain cold while apples blue nine counts and hills green over walks"
    chance = random.Random(2)
    own = [" ".join(chance.choices(f"a red llama {template}".split(), k=20)) for _ in range(30)]
    trained = [f"{template} {text}" for text in own]
    train = open_prepared(prepared_of(prepared, tmp_path, trained)).train
    tokenizer = load_tokenizer(tiny_tokenizer)
    fifth = own[5].split()
    judged = {
        "the template alone": (f"{template} {' '.join(reversed(template.split()))}", False),
        "twelve words": (" ".join(fifth[3:15]) + " llama llama llama", False),
        "thirteen words": (" ".join(fifth[3:16]) + " llama llama llama", True),
        "twelve words behind the template": (f"{template} {' '.join(fifth[:12])}", False),
        "in other case and with punctuation": (", ".join(own[7].split()[4:18]).upper() + "!", True),
        "too short": ("a red llama", False),
    }
    texts = [text for text, _ in judged.values()]
    (found,) = find_overlaps([JudgedRows("x", texts)], train, tokenizer, lambda event: None, lambda: False)

    def grams(text: str) -> list[tuple[str, ...]]:
        words = words_of(text)
        return [tuple(words[n : n + N]) for n in range(len(words) - N + 1)]

    def overlaps(text: str) -> bool:
        """By brute force: cut every word of a gram that more than ten rows hold, look for grams of what is left."""
        words, rows = words_of(text), [set(grams(row)) for row in trained]
        shared = [sum(gram in row for row in rows) for gram in grams(text)]
        gone = {n + i for n, count in enumerate(shared) if count > 10 for i in range(N)}
        left = "".join("|" if n in gone else f"{word} " for n, word in enumerate(words))
        return any(gram in row for piece in left.split("|") for gram in grams(piece) for row in rows)

    expected = [overlaps(text) for text in texts]
    assert found.ngram_rows == sum(expected)
    assert expected == [told for _, told in judged.values()]
    assert (found.rows, found.equal_rows, found.share) == (6, None, 2 / 6)
    assert found.short_rows == 2, "the last, and the one of which too little stays behind the template"


def test_equal_rows_and_equal_prompts_are_counted(prepared: Callable[..., Path], tiny_tokenizer: Path) -> None:
    data = open_prepared(prepared(validation_fraction=0.25, seed=3))
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert data.validation is not None
    same = prepared_rows("same", data.train, tokenizer, None)
    others = prepared_rows("others", data.validation, tokenizer, 4)
    found = find_overlaps([same, others], data.train, tokenizer, lambda event: None, lambda: False)
    assert (found[0].equal_rows, found[0].share) == (len(data.train), 1.0)
    trained = [row.tobytes() for row in data.train.rows_of_ids()]
    assert found[1].equal_rows == sum(row.tobytes() in trained for row in list(data.validation.rows_of_ids())[:4])
    assert found[1].rows == 4


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_singular_values_are_those_of_the_product(r: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = torch.randn(r, columns), torch.randn(rows, r)
    expected = torch.linalg.svdvals(B.double() @ A.double())
    found = singular_values(A, B)
    assert len(found) == min(r, rows, columns)
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-9, atol=1e-9)


def test_effective_rank_in_closed_form() -> None:
    assert effective_rank([3.0] * 5) == pytest.approx(5)
    assert effective_rank([2.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0
    assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_the_rank_of_each_layer_is_that_of_its_scaled_update(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    adapter = load_adapter(peft_adapter(tiny_base(), rank_pattern={"v_proj": 3}))
    use = rank_use(adapter)
    assert use is not None
    assert len(use.layers) == 21
    for layer in use.layers:
        A, B = adapter.trained(f"{layer.name}.weight")
        product = adapter.scaling(f"{layer.name}.weight") * (B.double() @ A.double())
        assert layer.r == (3 if layer.module == "v_proj" else 5)
        assert layer.singular_values == pytest.approx(torch.linalg.svdvals(product)[: layer.r].tolist())
        squares = [value**2 for value in layer.singular_values]
        assert sum(squares[: layer.rank_99]) >= 0.99 * sum(squares) > sum(squares[: layer.rank_99 - 1])
    ranks = [layer.effective_rank for layer in use.layers]
    assert use.mean_effective_rank == pytest.approx(sum(ranks) / 21)
