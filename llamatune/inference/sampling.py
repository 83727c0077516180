"""Which token comes next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.errors import SpecError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: ``temperature`` 0 is greedy, ``num_beams`` above 1 is beam search, drawing nothing."""

    max_new_tokens: int = 128
    temperature: float = 0.6
    top_k: int | None = None
    top_p: float = 0.9
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = (
            ("--max-new-tokens", self.max_new_tokens, 1 <= self.max_new_tokens <= 1 << 20, "1 to 1,048,576"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--num-beams", self.num_beams, 1 <= self.num_beams <= 64, "between 1 and 64"),
            ("--seed", self.seed, 0 <= self.seed < 1 << 63, "not negative"),
        )
        for name, value, fits, allowed in bounds:
            if not fits:
                raise SpecError(f"{name} is {value}, it must be {allowed}")


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
    """One token for each row of ``logits`` (B, V); each row draws from its own generator, so rows do not meet."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = token_distribution(logits, sampling).cpu()
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]
