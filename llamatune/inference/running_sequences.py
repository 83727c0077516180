"""Sequences that are being completed: what was chosen after each prompt, why it ends, and the next token of several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamatune.command_options.inference import Drawing
from llamatune.inference.sampling import next_tokens, penalised

IsEnough = Callable[[Sequence[int], Sequence[int]], bool]
"""Whether a completion needs no more, given its prompt and its ids so far; it is asked after each id."""


@dataclass(eq=False)
class RunningSequence:
    """A prompt that is being completed.

    ``seen`` (V,): the tokens in it and after it, where they are penalised. ``reason``: why it has ended; "" if not.
    """

    number: int
    prompt: Sequence[int]
    sampling: Drawing
    generator: torch.Generator
    adapted: bool
    chosen: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    reason: str = ""

    @property
    def tokens_left(self) -> int:
        """The most that may follow."""
        return self.sampling.max_new_tokens - len(self.chosen)

    def take(self, token: int, eos_ids: Collection[int], is_enough: IsEnough | None) -> bool:
        """Whether the completion ends with ``token``, which is added to it unless it is an EOS."""
        if token in eos_ids:
            self.reason = "eos"
            return True
        self.chosen.append(token)
        if is_enough is not None and is_enough(self.prompt, self.chosen):
            self.reason = "stop"
        elif not self.tokens_left:
            self.reason = "length"
        return self.reason != ""

    def seen_so_far(self, logits: Tensor) -> Tensor:
        """``seen`` with the last token in it, on the device of ``logits`` (..., V)."""
        if self.seen is None:
            self.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            self.seen[torch.tensor(self.prompt, device=logits.device)] = True
        else:
            self.seen[self.chosen[-1]] = True
        return self.seen


def draw_tokens(logits: Tensor, running: Sequence[RunningSequence]) -> list[int]:
    """A token for each row of ``logits`` (rows, V); rows that are alike are drawn together."""
    if not alike(running):
        return [draw_tokens(logits[row : row + 1], [sequence])[0] for row, sequence in enumerate(running)]
    sampling = running[0].sampling
    if sampling.repetition_penalty != 1:
        seen = torch.stack([sequence.seen_so_far(logits) for sequence in running])
        logits = penalised(logits.float(), seen, sampling.repetition_penalty)
    return next_tokens(logits, sampling, [sequence.generator for sequence in running])


def alike(running: Sequence[RunningSequence]) -> bool:
    """Whether all are drawn in one way, each with its own seed and length."""
    first = running[0].sampling
    return all(other.sampling is first or _way(other.sampling) == _way(first) for other in running)


def _way(how: Drawing) -> tuple[float | None, ...]:
    return how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty
