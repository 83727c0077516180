"""What decoding computes and keeps: tokens that beams share stand in the cache once, and finished rows leave it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference import beam_search
from llamatune.inference.engine import complete
from llamatune.inference.new_caches import new_cache
from llamatune.model.kv_cache import KVCache
from llamatune.model.transformer import Transformer
from llamatune.shapes import generation_sizes

DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
WINDOW = {"model_type": "mistral", "sliding_window": 9}
_chance = random.Random(8)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(length))] for length in (30, 2, 11, 5, 0, 9, 4)]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[KVCache]:
    """Those that are made, which grow from the first token on."""
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 1)
    made: list[KVCache] = []
    monkeypatch.setattr(beam_search, "new_cache", lambda *given: made.append(new_cache(*given)) or made[-1])
    return made


@pytest.mark.parametrize(("changes", "beams"), [({}, 8), (WINDOW, 4), (DYNAMIC, 2)], ids=["plain", "window", "dynamic"])
def test_beams_that_share_their_tokens_are_those_of_transformers(
    tiny_base: Callable[..., Path], caches: list[KVCache], changes: dict[str, Any], beams: int
) -> None:
    """From prompts within the window and the context of the pretraining to completions beyond them; two EOS.

    transformers keeps the angles of the longest sequence so far until one is shorter than that context.
    """
    from transformers import AutoModelForCausalLM

    base = tiny_base(**changes)
    ours, theirs = load_model(base).eval(), AutoModelForCausalLM.from_pretrained(base)
    for prompt in PROMPTS[1:3]:
        given = {"attention_mask": torch.ones(1, len(prompt), dtype=torch.int64), "do_sample": False, "pad_token_id": 0}
        free = complete(ours, [prompt], Sampling(28, num_beams=beams), ())[0].ids
        eos = [free[20], 7]
        for ends in ([], eos):
            theirs.generation_config.eos_token_id = ends or None
            ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=28, num_beams=beams, **given)
            found = ids[0, len(prompt) :].tolist()
            cut = next((place for place, token in enumerate(found) if token in ends), len(found))
            assert complete(ours, [prompt], Sampling(28, num_beams=beams), ends)[0].ids == found[:cut]
    assert all(len(cache._stored[0][0]) == 1 for cache in caches)


def test_a_prompt_is_computed_once_for_all_beams(tiny_base: Callable[..., Path], monkeypatch: Any) -> None:
    model, shapes = load_model(tiny_base()).eval(), list[tuple[int, ...]]()
    forward = Transformer.forward

    def counted(self: Transformer, ids: Any, *given: Any, **named: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *given, **named)

    monkeypatch.setattr(Transformer, "forward", counted)
    complete(model, [PROMPTS[0]], Sampling(3, num_beams=5), ())
    assert shapes == [(1, 31), (1, 5), (1, 5)]


def test_tokens_that_no_beam_consists_of_are_given_up(
    tiny_base: Callable[..., Path], caches: list[KVCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams come from one another again and again, so that most of what was tried is dead."""
    model = load_model(tiny_base()).eval()
    ids = complete(model, [PROMPTS[2]], Sampling(120, num_beams=4), ())[0].ids
    monkeypatch.setattr(beam_search._BeamTree, "_give_up_unseen", lambda self: None)
    assert complete(model, [PROMPTS[2]], Sampling(120, num_beams=4), ())[0].ids == ids
    cut, whole = (cache.length for cache in caches)
    assert whole == len(PROMPTS[2]) + 119 * 4
    assert cut < whole / 2


@pytest.mark.parametrize("changes", [{}, WINDOW, DYNAMIC], ids=["plain", "window", "dynamic"])
def test_rows_that_have_ended_are_no_longer_computed(
    tiny_base: Callable[..., Path], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass reads all prompts; then each of 39 gives a token to those that go on."""
    model, batches = load_model(tiny_base(**changes)).eval(), list[int]()
    ends = dict(zip(map(tuple, PROMPTS), (3, 40, 12, 9, 25, 1, 6), strict=True))
    free = {prompt: complete(model, [prompt], Sampling(40, 0), ())[0].ids for prompt in ends}
    forward = Transformer.forward

    def counted(self: Transformer, ids: Any, *given: Any, **named: Any) -> Any:
        batches.append(len(ids))
        return forward(self, ids, *given, **named)

    def is_enough(prompt: Any, ids: Any) -> bool:
        return any(list(ids) == free[prompt][:end] for prompt, end in ends.items())

    monkeypatch.setattr(Transformer, "forward", counted)
    made = complete(model, PROMPTS, Sampling(40, 0), (), is_enough=is_enough)
    assert [one.ids for one in made] == [free[prompt][:end] for prompt, end in ends.items()]
    assert [batches.count(size) for size in (7, 6, 5, 4, 3, 2, 1)] == [0, 2, 3, 3, 3, 13, 15 + 1]
