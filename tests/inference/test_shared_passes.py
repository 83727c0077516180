"""Base and tuned model in one pass: what each says is what it says in passes of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.events import Event, ignore_event, never_stop
from llamatune.inference import engine, model_completions
from llamatune.inference.engine import completions
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import LoadedModels, open_model
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.model.transformer import Transformer

_chance = random.Random(14)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(_chance.randrange(40)))] for _ in range(11)]
EOS = set(range(3, 9))


def loaded(base: Path, adapter: Path, **more: Any) -> LoadedModels:
    source = ModelSource(base, adapter, compare=True, device="cpu", **more)
    return open_model(source).load(ignore_event, never_stop)


def pairs(models: LoadedModels, sampling: Sampling, rows: int, **how: Any) -> list[tuple[Any, ...]]:
    return list(completions_by_model(models, PROMPTS, sampling, EOS, rows, **how))


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "dora": ({}, {"use_dora": True}),
    "some layers": ({}, {"targets": ["v_proj", "down_proj"]}),
    "sliding window": ({"model_type": "mistral", "sliding_window": 9}, {}),
}
HOW = {
    "greedy": Sampling(20, 0),
    "penalised": Sampling(20, 0, repetition_penalty=1.3),
    "drawn": Sampling(20, 1.0, seed=5, num_return_sequences=3),
}


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "greedy") for kind in KINDS), ("lora", "penalised"), ("dora", "drawn")]
)
def test_each_answer_is_that_of_a_model_alone(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str,
    how: str,
) -> None:  # fmt: skip
    """Also with few rows, and passes of so few tokens that a long prompt takes several."""
    of_base, of_adapter = KINDS[kind]
    base = tiny_base(**of_base)
    models, sampling = loaded(base, peft_adapter(base, **of_adapter)), HOW[how]
    assert models.switch is not None
    apart = pairs(replace(models, switch=None), sampling, 16)
    assert len(apart) == len(PROMPTS) * sampling.num_return_sequences
    assert sum(tuned.ids != bare.ids for tuned, bare in apart) > len(apart) // 2
    assert {one.finish_reason for both in apart for one in both} == {"eos", "length"}
    for rows, most in ((16, 2048), (2, 2048), (3, 24)):
        monkeypatch.setattr(engine, "tokens_in_a_pass", lambda *_, most=most: most)
        assert pairs(models, sampling, rows) == apart, (rows, most)


@pytest.mark.parametrize("length", [1, 2, 4, 7, 8, 9, 16, 17])
def test_the_base_is_itself_beside_the_tuned_model_in_bf16_where_passes_are_filled_up(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    amx: bool,
) -> None:
    base, seen, draw = tiny_base(), list[torch.Tensor](), engine.draw_tokens
    models = loaded(base, peft_adapter(base), dtype="bfloat16")
    monkeypatch.setattr(engine, "draw_tokens", lambda logits, *more: seen.append(logits.float()) or draw(logits, *more))
    for first in range(3, 43, 8):
        prompt = [1, *range(first, first + length - 1)]
        for switch in (models.switch, None):
            list(completions_by_model(replace(models, switch=switch), [prompt], Sampling(1, 0), (), 16))
        together, *alone = seen
        seen.clear()
        for row, expected in zip(together, alone, strict=True):
            assert (row - expected[0]).abs().max() < 0.1
        assert (alone[0] - alone[1]).abs().max() > 1


def test_positions_of_the_base_have_its_bits_and_the_others_those_of_the_tuned_model(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    """Logits of the same shape, and of a pass over samples in one row that reads their ends alone."""
    base = tiny_base()
    models = loaded(base, peft_adapter(base))
    tuned, plain, switch = models.by_prefix[""], models.by_prefix["base_"], models.switch
    assert switch is not None
    with torch.inference_mode():
        ids = torch.tensor([[1, 9, 17], [1, 40, 7], [1, 22, 30]])
        every = tuned(ids)
        switch.set([True, False, True], [3, 3, 3], ids.device)
        mixed = tuned(ids)
        assert torch.equal(mixed[[0, 2]], every[[0, 2]])
        assert torch.equal(mixed[1], plain(ids)[1])
        row, ends = ids.view(1, -1), torch.tensor([2, 5, 8])
        mixed = tuned(row, lengths=(3, 3, 3), rows=ends)
        switch.set([True] * 3, [3] * 3, ids.device)
        assert torch.equal(mixed[:, [0, 2]], tuned(row, lengths=(3, 3, 3), rows=ends)[:, [0, 2]])
        assert torch.equal(mixed[:, 1], plain(row, lengths=(3, 3, 3), rows=ends)[:, 1])


def test_frozen_products_are_computed_once_for_both(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, passes, forward = tiny_base(), list[int](), Transformer.forward
    models, sampling = loaded(base, peft_adapter(base)), Sampling(10, 0)

    def counted(self: Transformer, ids: torch.Tensor, *more: Any, **how: Any) -> Any:
        passes.append(len(ids))
        return forward(self, ids, *more, **how)

    monkeypatch.setattr(Transformer, "forward", counted)
    list(completions_by_model(models, PROMPTS[:1], sampling, (), 16))
    assert passes == [1, *[2] * 9], "one pass over both prompts, then both rows together"
    passes.clear()
    list(completions_by_model(replace(models, switch=None), PROMPTS[:1], sampling, (), 16))
    assert passes == [1] * 20


def test_the_last_that_runs_is_drafted_for(tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]) -> None:
    """A draft is checked with the adapter or without, as its row is."""
    base = tiny_base()
    models, sampling = loaded(base, peft_adapter(base)), Sampling(60, 0)
    ticks, drafted = itertools.count(), 0
    for prompt in PROMPTS[:4]:
        (apart,) = completions_by_model(replace(models, switch=None), [prompt], sampling, (), 1)
        for cut in (apart[0].ids[5], apart[1].ids[5]):  # ends one of the two early
            lookup = PromptLookup(clock=lambda: float(next(ticks)))
            alone = [next(completions(m, [prompt], sampling, {cut}, 1)) for m in models.by_prefix.values()]
            (both,) = completions_by_model(models, [prompt], sampling, {cut}, 1, make_lookup=lambda: lookup)  # noqa: B023
            assert list(both) == alone
            drafted += len(lookup._drafted)
    assert drafted


def test_an_adapter_that_changes_the_base_has_a_model_of_its_own(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base()
    models = loaded(base, peft_adapter(base, modules_to_save=["lm_head"]))
    assert models.switch is None
    assert len(pairs(models, Sampling(4, 0), 4)) == len(PROMPTS)


@pytest.mark.parametrize("dtype", ["nf4", "int8", "bfloat16"])
def test_quantised_weights_are_shared_too(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], dtype: str
) -> None:
    base = tiny_base(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    models = loaded(base, peft_adapter(base), dtype=dtype)
    assert models.switch is not None
    switch, ids = models.switch, torch.tensor([[1, 9, 17], [1, 40, 7]])
    with torch.inference_mode():
        both = {prefix: model(ids) for prefix, model in models.by_prefix.items()}
        switch.set([True, False], [3, 3], ids.device)
        mixed = models.by_prefix[""](ids)
    assert torch.equal(mixed[0], both[""][0])
    assert torch.equal(mixed[1], both["base_"][1])
    assert not torch.equal(both[""], both["base_"])


def test_there_are_as_many_rows_as_keys_and_values_fit_into_free_memory(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    models, config = loaded(base, peft_adapter(base)), open_model(ModelSource(base)).config
    tokens = max(map(len, PROMPTS)) + 20
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * tokens
    row += 16 * config.vocab_size  # the logits, and what choosing the likeliest has in flight
    expected, told, made = pairs(models, HOW["greedy"], 16), list[Event](), list[int]()
    begin = engine.Engine.__init__

    def noted(self: engine.Engine, model: Transformer, eos: set[int], rows: int, *more: Any) -> None:
        made.append(rows)
        begin(self, model, eos, rows, *more)

    monkeypatch.setattr(engine.Engine, "__init__", noted)
    for free, rows in ((10 * row, 4), (0, 1), (1 << 40, 16)):
        monkeypatch.setattr(model_completions, "free_memory_bytes", lambda device, free=free: free)
        assert pairs(models, HOW["greedy"], 16, on_event=told.append) == expected
        assert made.pop() == min(2 * rows, 2 * len(PROMPTS))
    assert [event.message.partition(" completions")[0] for event in told] == ["4", "1"]
