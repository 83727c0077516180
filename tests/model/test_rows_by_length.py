"""Groups of rows of like lengths: what they are, that a cache keeps them, and that completions are as alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import completions
from llamatune.model import attention, attention_of_one_query, kv_cache
from llamatune.model.attention import added, attend
from llamatune.model.kv_cache import RowCache
from llamatune.model.rows_by_length import groups_of_rows
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


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=12), amx=st.booleans())
def test_attention_reads_the_keys_of_the_groups_alone(lengths: list[int], amx: bool) -> None:
    """And gives what it gives of all keys, most of which the mask hides."""
    longest, found = max(lengths), []
    q, k, v = (torch.randn(len(lengths), heads, tokens, 8) for heads, tokens in ((6, 1), (3, longest), (3, longest)))
    mask = added(torch.arange(longest) < torch.tensor(lengths)[:, None], torch.float32)[:, None, None]
    groups = groups_of_rows(lengths, 1)
    real = attention._attend_one

    def noted(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        found.append((len(k), k.shape[2]))
        return real(q, k, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "has_amx", lambda: amx)
        patch.setattr(attention, "_attend_one", noted)
        together = attend(q, k, v, mask, None, groups)
        assert found == groups
        torch.testing.assert_close(together, attend(q, k, v, mask, None), atol=1e-6, rtol=0)


def test_steps_on_a_cpu_are_in_groups_that_save_enough_and_on_a_gpu_in_one() -> None:
    def cache(device: str) -> RowCache:
        made = RowCache(CONFIG, 3, torch.float32, torch.device(device))
        made.capacity, made.lengths = 20_000, [15_000, 100, 100]
        return made

    assert kv_cache.KEYS_TO_SAVE < 2 * 14_900 * 24  # three heads of eight numbers
    layers, mask = cache("cpu").next_token(torch.tensor([15_000, 100, 100]))
    assert layers.groups == [(1, 15_001), (2, 101)]
    assert mask is not None
    alike = cache("cpu")
    alike.lengths = [kv_cache.KEYS_TO_SAVE // 24, 1, 1]  # two rows that are shorter by less than half of the numbers
    alike.lengths[1:] = [alike.lengths[0] // 2 + 1] * 2
    layers, _ = alike.next_token(torch.tensor(alike.lengths))
    assert layers.groups == ()
    on_gpu = cache("cpu")
    with mock.patch.object(Tensor, "is_cuda", True):
        assert on_gpu._groups() == [(3, 15_000)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
        assert same >= len(prompts) - 2 * (dtype != torch.float32)  # in 16 bits near ties may fall otherwise
    assert max(seen) > 2
