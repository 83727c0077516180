"""Prompts longer than a pass: parts of about equal length, and attention behind earlier tokens without a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference import engine
from llamatune.inference.engine import Engine, complete
from llamatune.inference.new_caches import new_rows
from llamatune.inference.running_sequences import RunningSequence
from llamatune.model.attention import attend, mask_behind
from llamatune.model.transformer import Transformer
from llamatune.shapes import attention_kernels
from llamatune.shapes.attention_kernels import FEWEST_IN_PARTS, takes_mask
from llamatune.shapes.generation_sizes import tokens_of_a_part

CPU = torch.device("cpu")


@given(prompt=st.integers(1, 100_000), in_a_pass=st.integers(16, 128).map(lambda sixteens: 16 * sixteens))
def test_parts_are_as_few_as_passes_allow_and_about_equal(prompt: int, in_a_pass: int) -> None:
    tokens, fewest = tokens_of_a_part(prompt, in_a_pass), -(-prompt // in_a_pass)
    assert tokens <= in_a_pass
    assert -(-prompt // tokens) == fewest
    assert tokens - prompt / fewest < 32, "the first parts have at most their share and what makes them whole"


def test_the_engine_reads_parts_of_about_equal_length(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_base(max_position_embeddings=512)).eval()
    monkeypatch.setattr(engine, "tokens_in_a_pass", lambda *_: 192)
    passes: list[int] = []
    forward = Transformer.forward

    def noted(self: Transformer, ids: torch.Tensor, *more: Any, **how: Any) -> Any:
        passes.append(ids.shape[1])
        return forward(self, ids, *more, **how)

    monkeypatch.setattr(Transformer, "forward", noted)
    complete(model, [[5] * 200, [6] * 390], Sampling(1, temperature=0), ())
    assert passes == [128, 72, 160, 160, 70]


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize(
    ("heads", "key_heads", "start", "queries"),
    [(4, 4, 1, 128), (4, 4, 300, 131), (6, 2, 129, 257), (8, 1, 700, 200), (3, 3, 40, 800), (4, 2, 77, 2)],
)
def test_attention_in_parts_is_that_of_all_by_closed_form(
    heads: int, key_heads: int, start: int, queries: int, dtype: torch.dtype, most: float
) -> None:
    """Large scores among them, of which softmaxes of one part are all the weight there is, or none of it."""
    E, S = 24, start + queries
    chance = torch.Generator().manual_seed(3)
    q = torch.randn(2, queries, heads, E, generator=chance).mul_(3).to(dtype).transpose(1, 2)
    stored = torch.randn(2, 2, key_heads, S + 9, E, generator=chance).to(dtype)  # as a cache has them, with room
    k, v = stored[:, :, :, :S]
    scores = q.double() @ k.double().repeat_interleave(heads // key_heads, 1).transpose(2, 3) / E**0.5
    scores.masked_fill_(torch.ones(queries, S).triu_(start + 1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(heads // key_heads, 1)
    with torch.no_grad():
        found = attend(q, k, v, None, None)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=most, rtol=most)


@pytest.mark.parametrize(
    ("start", "queries", "window", "device", "masked"),
    [
        (0, 500, None, "cpu", False), (0, 500, None, "cuda", False), (500, 1, None, "cuda", False),
        (500, FEWEST_IN_PARTS, None, "cpu", False), (500, FEWEST_IN_PARTS - 1, None, "cpu", True),
        (500, FEWEST_IN_PARTS, None, "cuda", True), (500, 500, 1000, "cpu", False), (501, 500, 1000, "cpu", True),
        (0, 1000, 1000, "cpu", False), (0, 1001, 1000, "cpu", True), (1000, 1, 1000, "cpu", True),
    ],
)  # fmt: skip
def test_which_queries_take_a_mask(start: int, queries: int, window: int | None, device: str, masked: bool) -> None:
    assert takes_mask(start, queries, window, device) == masked
    if device == "cpu":
        assert (mask_behind(start, queries, window, CPU) is not None) == masked


@pytest.mark.parametrize(("start", "queries", "window"), [(5, 3, None), (5, 3, 4), (0, 9, 4), (7, 1, 4)])
def test_what_a_mask_shows(start: int, queries: int, window: int | None) -> None:
    mask = mask_behind(start, queries, window, CPU)
    assert mask is not None
    for query in range(queries):
        for key in range(start + queries):
            seen = key <= start + query and (window is None or key > start + query - window)
            assert bool(mask[0, 0, query, key]) == seen


FAMILIES: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2},
    "window": {"model_type": "mistral", "sliding_window": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_parts_is_completed_as_in_one_pass_and_by_transformers(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Parts with masks and without, as few as passes allow, and of about equal length."""
    from transformers import AutoModelForCausalLM

    base = tiny_base(**FAMILIES[family], max_position_embeddings=256)
    model = load_model(base).eval()
    prompt = [1, *torch.randint(3, 131, (136,), generator=torch.Generator().manual_seed(2)).tolist()]
    sequence = RunningSequence(0, prompt, Sampling(1, temperature=0), torch.Generator(), True)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([prompt])).logits[:, -1]
        found = {}
        for in_a_pass, fewest in ((200, 1), (60, 1), (60, 1000), (32, 1), (69, 24)):
            monkeypatch.setattr(engine, "tokens_in_a_pass", lambda *_, most=in_a_pass: most)
            monkeypatch.setattr(attention_kernels, "FEWEST_IN_PARTS", fewest)
            work = Engine(model, (), 1)
            work._cache = new_rows(model, 1)
            work._cache.capacity = len(prompt) + 1
            found[in_a_pass, fewest] = work._read_long(sequence)
    for logits in found.values():
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
