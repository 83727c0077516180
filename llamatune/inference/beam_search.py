"""Beam search: the likeliest completion of several that are continued side by side.

Beams that begin alike share what they share. Each token of the prompt and of the beams stands in one row of the cache
once, and a mask says of which tokens a beam consists, so that nothing is copied where several beams go on from one
(tree attention, Miao et al. 2024, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.errors import SpecError, Stopped
from llamatune.events import ShouldStop
from llamatune.inference.completion import Completion
from llamatune.inference.last_logits import last_logits
from llamatune.inference.new_caches import new_cache
from llamatune.inference.sampling import not_finite, penalised
from llamatune.model.layers import linear
from llamatune.model.transformer import Transformer


@torch.inference_mode()
def beam_search(
    model: Transformer, prompt: Sequence[int], sampling: Sampling, eos_ids: Collection[int], should_stop: ShouldStop
) -> list[Completion]:
    """The likeliest completions of ``num_beams`` beams, by log-probability / new tokens ** ``length_penalty``.

    There are ``num_return_sequences``, the best first.

    The search ends when no unfinished beam can still beat the worst of ``num_beams`` finished ones.
    """
    beams, vocabulary = sampling.num_beams, model.config.vocab_size
    tree = _BeamTree(model, len(prompt) + beams * sampling.max_new_tokens)
    sources, tokens = [0], list(prompt)
    scores = torch.zeros(1, device=model.device)
    unfinished: list[list[int]] = [[]]
    finished: list[tuple[float, list[int]]] = []
    for count in range(1, sampling.max_new_tokens + 1):
        if should_stop():
            raise Stopped("stopped while generating")
        length = count**sampling.length_penalty
        logits = tree.begin(tokens) if count == 1 else tree.extend(sources, tokens)  # (unfinished beams, V)
        steps = logits.float().log_softmax(-1)
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(steps, dtype=torch.bool)
            for row, ids in zip(seen, unfinished, strict=True):
                row[torch.tensor([*prompt, *ids], device=seen.device)] = True
            steps = penalised(steps, seen, sampling.repetition_penalty)
        total = (scores[:, None] + steps).reshape(-1)
        # Enough to fill the unfinished beams even if every EOS takes a place in each.
        best = total.topk(min(max(2, 1 + len(eos_ids)) * beams, len(total)))
        best_scores = best.values.tolist()
        if not math.isfinite(best_scores[0]):  # NaN comes first
            raise not_finite()
        kept: list[tuple[float, int, int]] = []
        for rank, (score, index) in enumerate(zip(best_scores, best.indices.tolist(), strict=True)):
            beam, token = divmod(index, vocabulary)
            if token in eos_ids:
                if rank < beams:
                    finished.append((score / length, unfinished[beam]))
            elif len(kept) < beams:
                kept.append((score, beam, token))
        finished = sorted(finished, key=lambda beam: -beam[0])[:beams]
        unfinished = [[*unfinished[beam], token] for _, beam, token in kept]
        if not kept or (len(finished) == beams and kept[0][0] / length <= finished[-1][0]):
            break
        scores = torch.tensor([score for score, _, _ in kept], device=model.device)
        sources, tokens = [beam for _, beam, _ in kept], [token for _, _, token in kept]
    else:
        finished += [(score / length, ids) for (score, _, _), ids in zip(kept, unfinished, strict=True)]
    returned = sorted(finished, key=lambda beam: -beam[0])[: sampling.num_return_sequences]
    if len(returned) < sampling.num_return_sequences:
        raise SpecError(f"the model has only {len(returned)} completions of this length", "--num-return-sequences")
    return [Completion(ids, "length" if len(ids) == sampling.max_new_tokens else "eos") for _, ids in returned]


class _BeamTree:
    """The cached tokens of all unfinished beams, which have one length.

    ``visible`` (beams, S): which tokens of the cache a beam consists of; ``positions`` (S,): where in a beam each
    stands. Before the cache grows, tokens that no beam consists of any more are given up.
    """

    def __init__(self, model: Transformer, capacity: int) -> None:
        self._model, self._cache, self._length = model, new_cache(model, capacity), 0
        self._visible = torch.empty((1, 0), dtype=torch.bool, device=model.device)
        self._positions = torch.empty(0, dtype=torch.int64, device=model.device)

    def begin(self, prompt: Sequence[int]) -> Tensor:
        """Logits (1, V) after the prompt, with which the one beam begins that there is."""
        device = self._model.device
        logits: Tensor = self._model(torch.tensor([prompt], device=device), cache=self._cache, read=last_logits)
        self._length = len(prompt)
        self._visible = torch.ones((1, self._length), dtype=torch.bool, device=device)
        self._positions = torch.arange(self._length, device=device)
        return logits

    def extend(self, sources: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits (beams, V) after each beam's new token; beam i goes on from ``sources[i]``."""
        beams, device = len(tokens), self._model.device
        came_from, input_ids = torch.tensor([sources, tokens], device=device)
        self._visible = self._visible[came_from]
        if (window := self._model.config.sliding_window) is not None:
            self._visible &= self._positions > self._length - window
        if not self._cache.has_room(beams):
            self._give_up_unseen()
        own = torch.eye(beams, dtype=torch.bool, device=device)
        self._visible = torch.cat((self._visible, own), dim=1)
        positions = torch.full((beams,), self._length, device=device)
        self._positions = torch.cat((self._positions, positions))
        mask = self._visible[None, None]  # (1, 1, beams, S)
        logits: Tensor = self._model(input_ids[None], positions[None], mask, self._cache, read=_all_logits)
        self._length += 1
        return logits

    def _give_up_unseen(self) -> None:
        seen = self._visible.any(0).nonzero()[:, 0]
        if len(seen) < self._cache.length:
            self._cache.keep_places(seen)
            self._visible, self._positions = self._visible[:, seen], self._positions[seen]


def _all_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Of every position of the one row, (1, T, D) -> (T, V)."""
    return linear(hidden[0], head_weight)
