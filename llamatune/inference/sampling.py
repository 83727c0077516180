"""Sampling: the next token from logits, by repetition penalty, temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatune.command_options.inference import Drawing
from llamatune.errors import NumericsError
from llamatune.inference.host_copies import sent
from llamatune.shapes.tile_sizes import COMPARED_AT_ONCE, drawn_rows

_BLOCK = 64
"""Of logits; a power of two."""

NO_TOKEN = -1
"""In place of a token where the logits hold NaN or infinity."""


def token_distribution(logits: Tensor, sampling: Drawing) -> Tensor:
    """Probabilities (B, V) in fp32 from logits (B, V): temperature, ``top_k`` likeliest, nucleus, ``min_p``, in turn.

    The nucleus is the smallest set of the likeliest tokens whose probabilities reach ``top_p`` (Holtzman et al. 2020).
    ``min_p`` leaves tokens of at least that share of the likeliest's probability (Nguyen et al. 2024).
    """
    # Relative to the likeliest, so that a tiny temperature divides to -inf and not to inf - inf.
    logits = logits.float().contiguous()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        # From the least on: sums of the likeliest are rounded to more than a nucleus of nearly all leaves out.
        ordered, indices = probabilities.sort(dim=-1, stable=True)
        outside = ordered.cumsum(-1) <= 1 - sampling.top_p
        outside[..., -1] = False
        ordered = ordered.masked_fill(outside, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``scores`` (B, V), logits or log-probabilities, those of the tokens ``seen`` (B, V) made less likely.

    They are divided by ``penalty`` (Keskar et al. 2019, section 4.1), or multiplied by it where they are negative.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def next_tokens(logits: Tensor, sampling: Drawing, generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each row of ``logits`` (B, V); each row draws from its own generator, so rows are independent.

    Raises:
        NumericsError: the logits hold NaN or infinity.
    """
    if sampling.temperature == 0 or not _draws_on_the_host(logits):
        chosen: list[int] = chosen_tokens(logits, sampling, generators).tolist()
        if NO_TOKEN in chosen:
            raise not_finite()
        return chosen
    tokens: list[int] = []
    for part in _portions(logits):
        tokens += _drawn(part, sampling, generators[len(tokens) : len(tokens) + len(part)])
    return tokens


def chosen_tokens(logits: Tensor, sampling: Drawing, generators: Sequence[torch.Generator]) -> Tensor:
    """As ``next_tokens``, (B,) on the device of ``logits``, which is not waited for; ``NO_TOKEN`` in place of an error.

    A generator gives one number for each token, so a sequence draws the same in any row of any batch.
    """
    if sampling.temperature == 0:
        return _likeliest(logits)
    uniforms = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    # A number so near to 1 could be rounded to the sum of all probabilities, beyond the last token.
    uniforms = sent(uniforms.clamp_(max=1 - 2.0**-52), logits.device)
    parts = zip(_portions(logits), torch.split(uniforms, _rows_at_once(logits)), strict=True)
    return torch.cat([tokens_at(token_distribution(part, sampling), places) for part, places in parts])


def tokens_at(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens (B,) at which the sums of ``probabilities`` (B, V) exceed ``uniforms`` (B,) fp64, of their whole.

    That is the inverse of the cumulative distribution (Devroye 1986, section III.2.1). ``NO_TOKEN`` of a row that holds
    NaN.
    """
    sums = probabilities.double().cumsum(-1)
    whole = sums[:, -1:]
    tokens = torch.searchsorted(sums, uniforms[:, None] * whole, right=True)
    return tokens.where(whole.isfinite(), NO_TOKEN)[:, 0]


def _draws_on_the_host(logits: Tensor) -> bool:
    return logits.device.type == "cpu"


def _rows_at_once(logits: Tensor) -> int:
    return drawn_rows(logits.shape[-1], logits.device.type)


def _portions(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, _rows_at_once(logits))


def _drawn(logits: Tensor, sampling: Drawing, generators: Sequence[torch.Generator]) -> list[int]:
    probabilities = token_distribution(logits, sampling)
    if not bool(probabilities.isfinite().all()):
        raise not_finite()
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def _likeliest(logits: Tensor) -> Tensor:
    """The tokens (B,) of the largest of ``logits`` (B, V); ``NO_TOKEN`` where that is not finite."""
    largest, likeliest = _largest(logits)
    return likeliest.where(largest.isfinite(), NO_TOKEN)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As ``logits.max(-1)`` of (B, V): NaN where there is one, and the first of equals.

    On a CPU ``max`` compares one number after another. Here many are compared at once: blocks first, then numbers in
    one, and what is left of whole blocks by itself.
    """
    whole = logits.shape[-1] // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or not whole:
        return logits.max(-1)
    largest, likeliest = _largest_by_blocks(logits[:, :whole])
    if whole == logits.shape[-1]:
        return largest, likeliest
    last, place = logits[:, whole:].max(-1)
    is_last = ~((last <= largest) | largest.isnan())
    return last.where(is_last, largest), (place + whole).where(is_last, likeliest)


def _largest_by_blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(logits)
    blocks = torch.unflatten(logits.contiguous() if rows == 1 else logits, -1, (-1, _BLOCK))  # (B, V / _BLOCK, _BLOCK)
    if blocks.stride(-1) == 1:
        of_blocks = blocks.amax(-1)
    else:
        at_once = max(1, COMPARED_AT_ONCE // (rows * _BLOCK))
        of_blocks = torch.cat([_by_halves(some) for some in torch.split(blocks.permute(1, 2, 0), at_once)]).T
    largest, block = of_blocks.max(-1)
    within = blocks[torch.arange(rows), block].max(-1).indices
    return largest, block * _BLOCK + within


def _by_halves(blocks: Tensor) -> Tensor:
    """As ``blocks.amax(1)``, of (blocks, _BLOCK, B): ``amax`` over what is not adjacent is slow for some B."""
    while (size := blocks.shape[1]) > 1:
        blocks = torch.maximum(blocks[:, : size // 2], blocks[:, size // 2 :])
    return blocks[:, 0]


def not_finite() -> NumericsError:
    """The error for logits without a next token."""
    todo = "check the weights with llamatune verify, or compute in --dtype float32"
    return NumericsError("the logits hold NaN or infinity, so there is no next token", None, todo)
