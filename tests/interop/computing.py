"""What llamatune computes of a model or an adapter: what judges are compared with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from asking import NEW_TOKENS, Answer

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.events import ignore_event, never_stop
from llamatune.inference.engine import complete
from llamatune.inference.model_source import open_model

CHATS = [
    [{"role": "user", "content": "Which river?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "How many apples?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "And stones?"},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello {{ 'x' }} é🦙"}],
]


@dataclass(frozen=True)
class Computed:
    """Logits (T, V) of each row of ids, and its greedy continuation without an EOS; ``theta`` of the model."""

    ids: list[list[int]]
    logits: list[torch.Tensor]
    greedy: list[list[int]]
    eos_ids: tuple[int, ...]
    theta: float


def random_ids(vocab_size: int) -> list[list[int]]:
    chance = random.Random(vocab_size)
    return [[chance.randrange(3, vocab_size) for _ in range(length)] for length in (29, 5)]


def compute(model: Path, adapter: Path | None = None, ids: list[list[int]] | None = None) -> Computed:
    """In fp32, of random rows where none are given."""
    opened = open_model(ModelSource(model, adapter, dtype="float32", device="cpu", force_base=True))
    computed = opened.load(ignore_event, never_stop).by_prefix[""]
    config = opened.checkpoint.config
    rows = random_ids(config.vocab_size) if ids is None else ids
    with torch.no_grad():
        logits = [computed(torch.tensor([row]))[0] for row in rows]
    sampling = Sampling(NEW_TOKENS, temperature=0)
    greedy = [list(complete(computed, [row], sampling, config.eos_token_ids)[0].ids) for row in rows]
    return Computed(rows, logits, greedy, config.eos_token_ids, config.rope_theta)


def worst_difference(answer: Answer, computed: Computed) -> float:
    """The greatest difference of any logit."""
    assert answer["release"]
    pairs = zip(answer.logits, computed.logits, strict=True)
    return max(float((torch.from_numpy(theirs) - ours).abs().max()) for theirs, ours in pairs)


def without_end(row: list[int], computed: Computed) -> list[int]:
    """A judge's continuation without the token that ended it: llamatune's has none."""
    return row[:-1] if row[-1] in computed.eos_ids else row
