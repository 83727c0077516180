"""Sampling: the next token from logits, by temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.errors import NumericsError


def token_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) in fp32 from logits (B, V): temperature, then the ``top_k`` likeliest, then the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose probabilities reach ``top_p`` (Holtzman et al. 2020).
    """
    # Relative to the likeliest, so that a tiny temperature divides to -inf and not to inf - inf.
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        ordered = ordered.masked_fill(outside, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def next_tokens(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """One token for each row of ``logits`` (B, V); each row draws from its own generator, so rows are independent.

    Raises:
        NumericsError: the logits hold NaN or infinity.
    """
    if sampling.temperature == 0:
        largest, likeliest = logits.max(-1)  # NaN where there is one
        chosen: list[int] = likeliest.where(largest.isfinite(), -1).tolist()
        if -1 in chosen:
            raise not_finite()
        return chosen
    probabilities = token_distribution(logits, sampling).cpu()
    if not bool(probabilities.isfinite().all()):
        raise not_finite()
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def not_finite() -> NumericsError:
    """The error for logits without a next token."""
    todo = "check the weights with llamatune verify, or compute in --dtype float32"
    return NumericsError("the logits hold NaN or infinity, so there is no next token", None, todo)
