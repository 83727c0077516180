"""Drafts from the text so far: the same tokens as without them, and only where they pay."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference import generate as generate_module
from llamatune.inference.completion import Completion
from llamatune.inference.engine import completions
from llamatune.inference.prompt_lookup import Continuations, PromptLookup
from llamatune.inference.running_sequences import IsEnough
from llamatune.inference.stop_texts import StopTexts
from llamatune.model.transformer import Transformer
from llamatune.tokenizers.loading import load_tokenizer

Command = Callable[..., Any]
_chance = random.Random(4)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(length))] for length in (7, 23, 12)]
PROMPTS.append(PROMPTS[0] * 3)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 9},
    "llama 3's angles": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
}  # fmt: skip


class Always(PromptLookup):
    """Drafts whenever there is one, and counts what the model has right."""

    def __init__(self, in_16_bits: bool = False, clock: Callable[[], float] | None = None) -> None:
        super().__init__(in_16_bits, clock or itertools.count().__next__)
        self.given: list[tuple[int, int]] = []  # tokens drafted, tokens taken

    def _pays(self) -> bool:
        return True

    def took(self, tokens: int) -> None:
        self.given.append((len(self._drafts), tokens))
        super().took(tokens)

    def draft(self, number: int, prompt: Sequence[int], chosen: Sequence[int], most: int) -> list[int]:
        self._drafts = super().draft(number, prompt, chosen, most)
        return self._drafts


class Measured(Always):
    """As ``PromptLookup``, counting."""

    def _pays(self) -> bool:
        return PromptLookup._pays(self)


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path]) -> Transformer:
    return load_model(tiny_base()).eval()


def both(
    model: Transformer,
    sampling: Sampling,
    eos: set[int],
    rows: int = 1,
    is_enough: IsEnough | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> tuple[list[Completion], Always]:
    """The completions with every draft, which must be those without; and what was drafted."""
    lookup = Always()
    found = list(completions(model, prompts, sampling, eos, rows, is_enough=is_enough, lookup=lookup))
    assert found == list(completions(model, prompts, sampling, eos, rows, is_enough=is_enough))
    return found, lookup


@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 0.8}, {"repetition_penalty": 1.02}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_without_drafts(
    tiny_base: Callable[..., Path], shape: str, how: dict[str, float]
) -> None:
    _, lookup = both(load_model(tiny_base(**SHAPES[shape])).eval(), Sampling(50, 0, **how), set())
    drafted = [taken for size, taken in lookup.given if size]
    assert {1, 9} < set(drafted), "some drafts are wrong, some are right in part, some as a whole"


@pytest.mark.parametrize("temperature", [0.05, 0.4])
def test_draws_are_those_without_drafts(model: Transformer, temperature: float) -> None:
    _, lookup = both(model, Sampling(60, temperature, seed=3), {5})
    assert any(taken > 1 for _, taken in lookup.given)


def _copying(base: Path) -> tuple[Transformer, list[int]]:
    """A model that goes around a cycle of tokens, and the cycle; its blocks add nothing."""
    model, cycle = load_model(base).eval(), list(range(40, 60))
    assert model.lm_head is not None
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_()
        model.lm_head.weight[cycle] = embedded[[cycle[-1], *cycle[:-1]]]
    return model, cycle


def test_a_completion_ends_within_a_draft(tiny_base: Callable[..., Path]) -> None:
    """At each of its places: by one of several EOS ids, by a stop text, and by the number of tokens."""
    base = tiny_base()
    tokenizer, (model, cycle) = load_tokenizer(base), _copying(base)
    prompt = [1, *cycle, *cycle]
    for right in range(1, 9):  # the first token is that of the prompt's pass
        end = cycle[right + 1]
        before, text = (tokenizer.token_bytes(token).decode() for token in cycle[right : right + 2])
        stops = StopTexts(tokenizer, ["<none>", before[-1:] + text]).is_enough
        for reason, tokens, eos, is_enough, ids in (
            ("eos", 40, {end, 2, 200}, None, cycle[: right + 1]),
            ("stop", 40, {2}, stops, cycle[: right + 2]),
            ("length", right + 1, {2}, None, cycle[: right + 1]),
        ):
            (made,), lookup = both(model, Sampling(tokens, 0), eos, is_enough=is_enough, prompts=[prompt])
            assert made == Completion(ids, reason)
            size = right - 1 if reason == "length" else 8
            assert lookup.given == [(size, len(ids) - 1)]


def test_the_option_changes_no_result(
    command: Command, tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[Always] = []
    monkeypatch.setattr(generate_module, "PromptLookup", lambda _: lookups.append(Always()) or lookups[-1])
    base = tiny_base()

    def result(*more: str) -> Any:
        asked = ("--prompt", "to be or not to be", "--temperature", "0", "--max-new-tokens", "60", "--json")
        outcome = command("generate", "--model", base, *asked, *more)
        assert outcome.code == 0, outcome.stderr
        return json.loads(outcome.stdout)["results"]

    whole = result("--lookup", "off")
    assert not lookups
    assert result() == whole
    assert any(taken > 1 for _, taken in lookups[0].given)
    stop = ("--stop", whole[0]["completion"][30:32])
    assert result(*stop) == result(*stop, "--lookup", "off") != whole


def test_drafts_are_made_where_one_sequence_runs(model: Transformer) -> None:
    """In a batch that is when the others have ended; beams make none."""
    eos = set(range(3, 11))
    _, alone = both(model, Sampling(60, 0), eos)
    found, shared = both(model, Sampling(60, 0), eos, rows=4)
    assert 0 < len(shared.given) < len(alone.given)
    assert {made.finish_reason for made in found} == {"eos", "length"}
    assert not both(model, Sampling(4, 0, num_beams=2), eos)[1].given


def test_none_are_made_where_tokens_could_differ(tiny_base: Callable[..., Path]) -> None:
    """By the length of a pass with dynamic angles; by rounding in 16 bits, unless a near tie may fall otherwise."""
    dynamic = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert not both(load_model(tiny_base(**dynamic)).eval(), Sampling(30, 0), set())[1].given
    short = load_model(tiny_base(), torch.bfloat16).eval()
    for temperature, in_16_bits in ((0.5, True), (0, False), (0, True)):
        lookup = Always(in_16_bits)
        list(completions(short, PROMPTS, Sampling(30, temperature), set(), 1, lookup=lookup))
        assert bool(lookup.given) == (temperature == 0 and in_16_bits)


def test_drafts_are_what_followed_the_last_tokens_where_they_stood_last() -> None:
    for letters in (1, 2, 3, 6):
        text, ids = Continuations(), list[int]()
        for _ in range(120):
            ids.append(_chance.randrange(letters))
            text.add(ids[-1])
            assert text.draft(5) == _searched(ids, 5)


def _searched(ids: list[int], tokens: int) -> list[int]:
    for size in (3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                going_on = list(ids)
                for place in range(tokens):
                    going_on.append(going_on[end + place])
                return going_on[len(ids) :]
    return []


def _follow(lookup: PromptLookup, text: Sequence[int], cost: float, clock: list[float], number: int = 0) -> float:
    """Give ``text`` to a lookup as a model would; the seconds of all steps, ``cost`` with a draft and 1 without."""
    began, done = clock[0], 1
    while done < len(text):
        draft = lookup.draft(number, [], text[:done], len(text) - done - 1)
        right = sum(itertools.accumulate((a == b for a, b in zip(draft, text[done:], strict=False)), min))
        clock[0] += cost if draft else 1.0
        lookup.took(right + 1)
        done += right + 1
    return clock[0] - began


REPEATING = list(range(20)) * 30
VARIED = [_chance.randrange(40) for _ in range(600)]


@pytest.mark.parametrize(
    ("text", "cost", "least", "most"),
    [
        (REPEATING, 1.5, 0.0, 0.35),
        (REPEATING, 20.0, 1.0, 1.16),  # tried, and tried again ever more seldom
        (VARIED, 1.5, 0.99, 1.01),
        (VARIED, 20.0, 0.99, 1.03),
        (REPEATING + VARIED, 1.5, 0.5, 0.7),
        (VARIED + REPEATING, 1.5, 0.5, 0.7),
    ],
)
def test_drafts_are_made_where_they_pay(text: list[int], cost: float, least: float, most: float) -> None:
    """The seconds of all steps to those of steps without drafts, when a step with a draft takes ``cost``."""
    clock = [0.0]
    lookup = Measured(clock=lambda: clock[0])
    assert least <= _follow(lookup, text, cost, clock) / (len(text) - 1) <= most
    if text is VARIED:
        assert sum(size > 0 for size, _ in lookup.given) <= 2


def test_drafts_are_made_again_after_a_busy_time() -> None:
    clock = [0.0]
    lookup = Measured(clock=lambda: clock[0])
    _follow(lookup, REPEATING[:200], 50.0, clock)
    assert _follow(lookup, REPEATING, 1.0, clock, number=1) < len(REPEATING) / 2
