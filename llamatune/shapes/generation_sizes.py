"""Sizes of generation: rows at once, tokens of a pass over prompts, room and bytes of the key-value cache. No torch.

The engine and the caches work by these, and the memory plan counts by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.rope_scaling import DynamicScaling

ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}
"""Completions that are computed together if not otherwise asked for, by kind of device.

A step reads all weights whatever its rows: more rows take longer a step and less time a token, up to about so many.
"""

ROWS_OF_STREAMED = 16
"""The same where blocks are not on the device, whose memory is short then, or where ranks make the same passes."""

_ROOM_SHARE = 0.8
"""Of the free memory, what keys and values of generation, and the choice of tokens, may take."""

_CHOICE_BYTES = {True: 40, False: 16}
"""Of a logit, what the choice of a token has in flight, whether it is drawn or the likeliest, with the logits."""

_MOST_TOKENS, _FEWEST_TOKENS = 2048, 256
_SHARE = {"cpu": 0.025, "cuda": 0.08}
"""Of the weights' bytes, what a pass over prompts may have in flight beside them, by kind of device.

On a CPU the allocator keeps as much again of what is freed, and a pass of fewer tokens is as quick.
"""

_WHOLE_PART = 32
"""Tokens that parts of prompts are whole multiples of where a pass takes them, so that the sizes of products recur."""

FIRST_ROOM_TOKENS = 256

_LARGEST_POWER = 16
"""Of rows of a captured step; larger sizes are multiples of it."""


def captured_rows(running: int, rows: int) -> int:
    """Rows of the captured step that decodes ``running`` of at most ``rows``: a power of two up to 16, then sixteens.

    A few sizes serve all numbers, as a graph is of one size; less than half of the rows are computed for nothing.
    """
    power = 1 << (running - 1).bit_length()
    return min(rows, power if power <= _LARGEST_POWER else -(-running // _LARGEST_POWER) * _LARGEST_POWER)


def token_cache_bytes(config: LlamaConfig, element_bytes: int) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element_bytes


def rows_that_fit(
    config: LlamaConfig,
    element_bytes: int,
    tokens: int,
    draws: bool,
    free_bytes: float,
    models: int = 1,
    share: float = _ROOM_SHARE,
) -> int:
    """Completions of so many tokens, prompts included, whose keys, values and logits take a share of the free memory.

    At least one. ``models``: those that each is computed by.
    """
    logits = config.vocab_size * _CHOICE_BYTES[draws]
    row = models * (tokens * token_cache_bytes(config, element_bytes) + logits)
    return max(1, int(share * free_bytes) // row)


def grown_room(needed: int, capacity: int) -> int:
    """Tokens that a cache makes room for which has too little for ``needed``; ``capacity``: the most of them."""
    return max(needed, min(capacity, max(2 * needed, FIRST_ROOM_TOKENS)))


def tokens_in_a_pass(config: LlamaConfig, element_bytes: int, device: str) -> int:
    """Tokens of prompts that are read together, computed in numbers of so many bytes; a longer prompt takes several.

    So many that what a block has in flight is little beside the weights, between 256 and 2,048 in whole sixteens.
    """
    weights = element_bytes * sum(math.prod(shape) for _, shape in config.parameter_shapes())
    states, fed_forward = config.hidden_size, config.intermediate_size
    of_a_token = element_bytes * (6 * states + 2 * fed_forward) + 12 * states
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, int(_SHARE[device] * weights / of_a_token) // 16 * 16))


def tokens_of_a_part(prompt: int, in_a_pass: int) -> int:
    """Tokens of each pass over a prompt that takes several, about as many in all of them; the last has the rest."""
    equal = -(-prompt // -(-prompt // in_a_pass))
    return min(in_a_pass, -(-equal // _WHOLE_PART) * _WHOLE_PART)


def with_filling(lengths: Sequence[int], filling: int, config: LlamaConfig) -> tuple[int, ...]:
    """Lengths of the samples of a pass that is filled up by so many tokens.

    They belong to the last prompt, which does not see what follows it; they are a sample of their own where the angles
    of a prompt depend on its length.
    """
    if not filling:
        return tuple(lengths)
    if isinstance(config.rope_scaling, DynamicScaling):
        return (*lengths, filling)
    return (*lengths[:-1], lengths[-1] + filling)
