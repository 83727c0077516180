"""Decoding in batches, with a cache and with beams, against transformers and against decoding alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.errors import NumericsError, Stopped
from llamatune.inference import beam_search, engine
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine, complete, completions
from llamatune.inference.new_caches import new_cache, new_rows
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.model.kv_cache import KVCache, RowCache
from llamatune.model.transformer import Transformer

_chance = random.Random(4)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(length))] for length in (7, 1, 23, 0, 12)]


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path]) -> Transformer:
    return load_model(tiny_base()).eval()


@pytest.fixture(scope="module")
def reference(tiny_base: Callable[..., Path]) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_base())


def _transformers_ids(
    reference: torch.nn.Module, prompt: list[int], eos: list[int] | None, **options: object
) -> list[int]:
    reference.generation_config.eos_token_id = eos
    found = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        pad_token_id=0, **options,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return next((found[:i] for i, token in enumerate(found) if token in (eos or ())), found)


@pytest.mark.parametrize("prompt", PROMPTS, ids=[f"{len(prompt)} tokens" for prompt in PROMPTS])
def test_greedy_ids_are_those_of_transformers(
    model: Transformer, reference: torch.nn.Module, prompt: list[int]
) -> None:
    expected = _transformers_ids(reference, prompt, None, max_new_tokens=40)
    assert complete(model, [prompt], Sampling(max_new_tokens=40, temperature=0), ())[0].ids == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_prompt_in_a_batch_is_completed_as_alone(model: Transformer, temperature: float) -> None:
    """Ragged prompts; EOS ends some of them early."""
    sampling = Sampling(max_new_tokens=20, temperature=temperature, seed=3)
    first = complete(model, PROMPTS, sampling, ())
    eos = {first[0].ids[9], first[2].ids[4]}
    alone = [complete(model, [prompt], sampling, eos)[0] for prompt in PROMPTS]
    assert complete(model, PROMPTS, sampling, eos) == alone
    assert complete(model, PROMPTS[::-1], sampling, eos) == alone[::-1]
    assert {found.finish_reason for found in alone} == {"eos", "length"}


MANY = [[1, *(_chance.randrange(3, 131) for _ in range(_chance.randrange(40)))] for _ in range(25)]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 9},
    "llama 3's angles": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "dynamic angles": {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize(("shape", "temperature"), [*((shape, 0.0) for shape in SHAPES), ("llama", 1.0)])
def test_prompts_that_share_rows_are_completed_as_alone(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, shape: str, temperature: float
) -> None:
    """More prompts than rows, some ended after few tokens; passes of few tokens, so that long prompts take several."""
    model = load_model(tiny_base(**SHAPES[shape])).eval()
    sampling = Sampling(max_new_tokens=24, temperature=temperature, seed=5)
    eos = set(range(3, 11))
    alone = [complete(model, [prompt], sampling, eos)[0] for prompt in MANY]
    assert {found.finish_reason for found in alone} == {"eos", "length"}
    monkeypatch.setattr(engine, "tokens_in_a_pass", lambda *_: 24)
    for rows in (3, 16, 64):
        assert list(completions(model, iter(MANY), sampling, eos, rows)) == alone
    assert list(completions(model, MANY[::-1], sampling, eos, 5)) == alone[::-1]


def test_each_prompt_has_its_own_sampling(model: Transformer) -> None:
    """Four ways in one batch, of lengths, seeds, temperatures and penalties, and drafts where a prompt is alone."""
    ways = [Sampling(9, 0), Sampling(24, 1.0, seed=3), Sampling(16, 0.7, top_k=5, seed=4),
            Sampling(20, 0, repetition_penalty=1.3)]  # fmt: skip
    eos = set(range(3, 11))
    asked = list(zip(MANY, itertools.cycle(ways), strict=False))
    alone = [complete(model, [prompt], sampling, eos)[0] for prompt, sampling in asked]
    for rows, lookup in ((1, PromptLookup()), (7, None), (64, None)):
        shared = Engine(model, eos, rows, lookup=lookup)
        for prompt, sampling in asked:
            shared.add(prompt, sampling)
        found: dict[int, Completion] = {}
        while not shared.is_done:
            found.update(shared.step())
        assert [found[number] for number in range(len(asked))] == alone


def test_no_prompt_waits_while_all_can_have_rows(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that take a pass each: the last is read before any other goes on."""
    monkeypatch.setattr(engine, "tokens_in_a_pass", lambda *_: 20)
    shared = Engine(model, (), 16)
    for _ in range(16):
        shared.add(list(range(3, 18)), Sampling(4, 0))
    for _ in range(16):
        assert shared.waiting
        shared.step()
    assert not shared.waiting


def test_rows_that_end_are_filled_at_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 25 prompts on 8 rows: no more than the tokens need, but for the last rows and the prompts' passes."""
    sampling, eos = Sampling(max_new_tokens=60, temperature=1.0, seed=5), set(range(3, 11))
    passes: list[int] = []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, ids, *more, **how: passes.append(ids.shape[0]) or forward(self, ids, *more, **how),
    )
    found = list(completions(model, MANY, sampling, eos, 8))
    drawn = sum(len(one.ids) + (one.finish_reason == "eos") for one in found)
    longest = max(len(one.ids) for one in found)
    assert len(passes) <= (drawn - len(MANY)) / 8 + len(MANY) + longest
    batches = -(-len(MANY) // 8)
    assert len(passes) < sum(max(len(one.ids) for one in found[8 * at : 8 * at + 8]) for at in range(batches))


def test_the_first_answers_come_before_the_last_prompts_are_asked_for(model: Transformer) -> None:
    asked = []
    prompts = (asked.append(prompt) or prompt for prompt in MANY)
    next(completions(model, prompts, Sampling(4, 0), (), rows=4))
    assert len(asked) <= 12 < len(MANY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_choose_what_is_nearly_the_likeliest(tiny_base: Callable[..., Path], dtype: torch.dtype) -> None:
    """In a batch and alone, products are rounded in other ways, so that near ties may fall otherwise."""
    model = load_model(tiny_base(), dtype).eval()
    for prompt, found in zip(MANY, completions(model, MANY, Sampling(12, 0), (), rows=7), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *found.ids]]))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
        assert bool((logits.amax(1) - chosen <= 0.02 * logits.abs().amax(1)).all())


def test_sampling_is_a_function_of_the_seed(model: Transformer) -> None:
    def ids(seed: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
        torch.rand(5)  # the global generator has no say
        return [found.ids for found in complete(model, prompts, Sampling(20, 1.0, seed=seed), ())]

    assert ids(1) == ids(1)
    assert ids(1)[2] == ids(1, [PROMPTS[2]])[0]
    assert all(one != other for one, other in zip(ids(1), ids(2), strict=True))


def test_eos_stops_and_is_left_out(model: Transformer) -> None:
    free = complete(model, [PROMPTS[0]], Sampling(20, 0), ())[0].ids
    cut = free.index(free[6])
    stopped = complete(model, [PROMPTS[0]], Sampling(20, 0), {free[6]})[0]
    assert (stopped.ids, stopped.finish_reason) == (free[:cut], "eos")
    assert complete(model, [PROMPTS[0]], Sampling(6, 0), ())[0].finish_reason == "length"
    at_once = complete(model, [PROMPTS[0]], Sampling(20, 0), {free[0]})[0]
    assert (at_once.ids, at_once.finish_reason) == ([], "eos")


def test_what_is_enough_ends_one_prompt_and_not_its_neighbours(model: Transformer) -> None:
    free = [found.ids for found in complete(model, PROMPTS, Sampling(20, 0), ())]
    wanted = free[2][7]
    found = complete(model, PROMPTS, Sampling(20, 0), (), is_enough=lambda _, ids: ids[-1] == wanted)
    for ids, one in zip(free, found, strict=True):
        cut = ids.index(wanted) + 1 if wanted in ids else len(ids)
        assert (one.ids, one.finish_reason) == (ids[:cut], "stop" if wanted in ids else "length")
    assert {one.finish_reason for one in found} == {"stop", "length"}


def test_decoding_asks_whether_to_stop(model: Transformer) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        complete(model, PROMPTS, Sampling(20, 0), (), lambda: next(answers))
    with pytest.raises(Stopped):
        complete(model, PROMPTS, Sampling(20, 0, num_beams=2), (), lambda: True)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_penalised_repetitions_are_those_of_transformers(
    model: Transformer, reference: torch.nn.Module, penalty: float
) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=0, repetition_penalty=penalty)
    found = completions(model, PROMPTS, sampling, (), rows=2)
    for prompt, one in zip(PROMPTS, found, strict=True):
        expected = _transformers_ids(reference, prompt, None, max_new_tokens=30, repetition_penalty=penalty)
        assert one.ids == expected


# Beam search.


PENALTIES: list[dict[str, float]] = [
    {"length_penalty": 0.3},
    {"length_penalty": 3.0},
    {"length_penalty": -1.0},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.9, "length_penalty": 2.0},
]


@pytest.mark.parametrize("how", PENALTIES)
def test_beams_are_compared_and_penalised_as_by_transformers(
    model: Transformer, reference: torch.nn.Module, how: dict[str, float]
) -> None:
    chance = random.Random(6)
    for _ in range(8):
        prompt = [1, *(chance.randrange(3, 131) for _ in range(chance.randrange(1, 9)))]
        eos = sorted(chance.sample(range(3, 131), 12))
        expected = _transformers_ids(reference, prompt, eos, max_new_tokens=12, num_beams=3, **how)
        found = complete(model, [prompt], Sampling(max_new_tokens=12, num_beams=3, **how), set(eos))[0]
        assert found.ids == expected, (prompt, eos)


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beam_search_without_eos_is_that_of_transformers(
    model: Transformer, reference: torch.nn.Module, beams: int, length: int
) -> None:
    sampling = Sampling(max_new_tokens=length, num_beams=beams)
    for prompt in PROMPTS[:3]:
        expected = _transformers_ids(reference, prompt, None, max_new_tokens=length, num_beams=beams)
        found = complete(model, [prompt], sampling, ())[0]
        assert found.ids == expected
        assert found.finish_reason == "length"


@pytest.mark.parametrize("beams", [2, 4, 8])
@pytest.mark.parametrize("ends", [1, 2, 3])
def test_beam_search_with_eos_is_that_of_transformers(
    model: Transformer, reference: torch.nn.Module, beams: int, ends: int
) -> None:
    """EOS tokens that the beams meet: of one, two or three ids (Llama 3 has two). Many prompts, many ways to end."""
    chance, reasons = random.Random(beams * 10 + ends), set()
    for _ in range(12):
        prompt = [1, *(chance.randrange(3, 131) for _ in range(chance.randrange(1, 9)))]
        with torch.no_grad():
            likeliest = model(torch.tensor([prompt]))[0, -1].topk(ends + 6).indices.tolist()
        eos = sorted(chance.sample(likeliest, ends))
        expected = _transformers_ids(reference, prompt, eos, max_new_tokens=9, num_beams=beams)
        found = complete(model, [prompt], Sampling(max_new_tokens=9, num_beams=beams), set(eos))[0]
        assert found.ids == expected, (prompt, eos)
        reasons.add(found.finish_reason)
    assert reasons == {"eos", "length"}


def test_beam_search_survives_eos_tokens_that_take_every_place(model: Transformer) -> None:
    """Several EOS ids can fill all the candidates that are looked at; something must still be left to extend."""
    with torch.no_grad():
        likeliest = model(torch.tensor([PROMPTS[0]]))[0, -1].topk(4).indices.tolist()
    found = complete(model, [PROMPTS[0]], Sampling(max_new_tokens=5, num_beams=2), set(likeliest))[0]
    assert not set(found.ids) & set(likeliest)


@pytest.mark.parametrize("beams", [1, 4])
def test_the_cache_takes_room_for_what_is_used_of_the_length(
    model: Transformer, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = {complete(model, [PROMPTS[2]], Sampling(30, 0, num_beams=beams), ())[0].ids[-1]}
    caches: list[KVCache | RowCache] = []
    for module, name, new in ((engine, "new_rows", new_rows), (beam_search, "new_cache", new_cache)):
        monkeypatch.setattr(module, name, lambda *given, new=new: caches.append(new(*given)) or caches[-1])
    short, long = (
        complete(model, [PROMPTS[2]], Sampling(length, 0, num_beams=beams), eos)[0] for length in (40, 1 << 20)
    )
    assert short.finish_reason == "eos"
    assert long == short
    rooms = [{stored.shape[3] for stored in cache._stored} for cache in caches]
    assert rooms == [{len(PROMPTS[2]) + beams * 40}, {256}]


@pytest.mark.parametrize(("dtype", "bytes_of_one"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_of_the_logits_of_a_step_is_used_again(
    tiny_base: Callable[..., Path], dtype: torch.dtype, bytes_of_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(engine, "reuse_freed_too", asked.append)
    model = load_model(tiny_base(), dtype)
    list(completions(model, PROMPTS[:3], Sampling(2, 0), (), 16))
    assert asked == [3 * model.config.vocab_size * bytes_of_one]


def test_several_prompts_with_beams_are_completed_as_alone(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=8, num_beams=3)
    alone = [complete(model, [prompt], sampling, {9, 40})[0] for prompt in PROMPTS]
    assert complete(model, PROMPTS, sampling, {9, 40}) == alone


def test_a_single_beam_is_not_beam_search(model: Transformer) -> None:
    """One beam samples, or takes the likeliest at temperature 0."""
    greedy = complete(model, [PROMPTS[0]], Sampling(12, 0, num_beams=1), ())[0].ids
    assert complete(model, [PROMPTS[0]], Sampling(12, 1.0, seed=1, num_beams=1), ())[0].ids != greedy


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"num_beams": 3, "temperature": 0.0}])
def test_a_model_with_nan_is_an_error_and_no_text(tiny_base: Callable[..., Path], sampling: dict[str, float]) -> None:
    broken = load_model(tiny_base()).eval()
    with torch.no_grad():
        next(broken.parameters()).mul_(torch.nan)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        complete(broken, PROMPTS, Sampling(max_new_tokens=2, **sampling), [2])
