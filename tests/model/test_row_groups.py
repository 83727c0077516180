"""Groups of rows of like lengths: what they are, that a cache keeps them, and that completions are as alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import completions
from llamatune.model import attention_of_one_query, kv_cache
from llamatune.model.kv_cache import RowCache
from llamatune.model.row_groups import groups_of_rows
from llamatune.model.transformer import Transformer
from llamatune.shapes import attention_kernels
from llamatune.shapes.llama_config import LlamaConfig

CONFIG = LlamaConfig(48, 96, 3, 6, 3, 97, max_position_embeddings=512)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


def keys_read(lengths: list[int], ends: tuple[int, ...]) -> int:
    """Of rows in groups that end there."""
    begins = (0, *ends[:-1])
    return sum((end - begin) * max(lengths[begin:end]) for begin, end in zip(begins, ends, strict=True))


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, least=st.integers(0, 200))
def test_each_split_saves_what_it_has_to(lengths: list[int], least: int) -> None:
    groups = groups_of_rows(lengths, least)
    ends = tuple(accumulate(rows for rows, _ in groups))
    assert ends[-1] == len(lengths)
    assert [keys for _, keys in groups] == [
        max(lengths[end - rows : end]) for (rows, _), end in zip(groups, ends, strict=True)
    ]
    whole = len(lengths) * max(lengths)
    assert whole - keys_read(lengths, ends) >= (len(groups) - 1) * max(1, least)
    best = min((keys_read(lengths, (end, len(lengths))) for end in range(1, len(lengths))), default=whole)
    if len(groups) == 1:
        assert whole - best < max(1, least)
    else:
        assert keys_read(lengths, ends) <= best


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, chance=st.randoms(use_true_random=False))
def test_a_cache_keeps_rows_and_groups_when_some_are_dropped(lengths: list[int], chance: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "KEYS_TO_SAVE", 1)
        cache = RowCache(CONFIG, len(lengths) + 2, torch.float32, torch.device("cpu"))
    cache.capacity = 64
    cache.begin(lengths)
    for layer in range(CONFIG.num_hidden_layers):
        for row in range(len(lengths)):
            cache.layer(layer, 0)[:, row] = 100 * layer + row
    groups = groups_of_rows(lengths, 1)
    group_of = [group for group, (rows, _) in enumerate(groups) for _ in range(rows)]
    dropped = chance.sample(range(len(lengths)), chance.randint(1, len(lengths)))  # type: ignore[attr-defined]
    origin = cache.drop(dropped)
    assert sorted(origin) == sorted(set(range(len(lengths))) - set(dropped))
    assert cache.lengths == [lengths[row] for row in origin]
    assert [group_of[row] for row in origin] == sorted(group_of[row] for row in origin)
    moved = sum(place != row for place, row in enumerate(origin))
    assert moved <= len(groups) * len(dropped)
    for layer in range(CONFIG.num_hidden_layers):
        for place, row in enumerate(origin):
            assert (cache.layer(layer, 0)[:, place, :, : lengths[row]] == 100 * layer + row).all()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_in_groups_are_those_of_prompts_alone(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention by products, and without."""
    torch.manual_seed(3)
    model = Transformer(replace(CONFIG, sliding_window=window)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    model = model.to(dtype)
    prompts = [torch.randint(97, (length,)).tolist() for length in (50, 3, 20, 31, 2, 40, 7, 60, 5, 11)]
    sampling = Sampling(25, temperature=0)
    alone = [next(iter(completions(model, [prompt], sampling, (4, 5), 1))) for prompt in prompts]
    seen: list[int] = []
    real = kv_cache.groups_of_rows

    def noted(lengths: list[int], least: int) -> object:
        seen.append(len(groups := real(lengths, least)))
        return groups

    monkeypatch.setattr(kv_cache, "groups_of_rows", noted)
    monkeypatch.setattr(kv_cache, "KEYS_TO_SAVE", 1)
    for most in (1, 1 << 20):
        monkeypatch.setattr(attention_kernels, "LEAST_BY_PRODUCTS", most)
        monkeypatch.setattr(attention_of_one_query, "WIDENED_AT_ONCE", most)
        together = list(completions(model, prompts, sampling, (4, 5), 6))
        same = sum(one.ids == other.ids for one, other in zip(alone, together, strict=True))
        assert same == len(prompts) if dtype == torch.float32 else same >= 7  # in bf16 near ties may fall otherwise
    assert max(seen) > 2
