"""Decoding engine: batched token generation with a KV cache, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.inference.sampling import next_tokens
from llamatune.model.kv_cache import KVCache
from llamatune.model.layers import linear
from llamatune.model.transformer import Transformer
from llamatune.seeds import derived_seed


@dataclass(frozen=True)
class Completion:
    """New ids without the EOS; ``finish_reason`` is ``eos``, ``length``, or ``stop``: ``is_enough`` said so."""

    ids: list[int]
    finish_reason: str


def _new_cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    dtype = model.activation_dtype or model.model.embed_tokens.weight.dtype
    return KVCache(model.config, batch, capacity, dtype, model.device)


def _next_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, (B, T, D) -> (B, V)."""
    return linear(hidden[:, -1], head_weight)


def _visible(padding: Tensor, first: int, last: int) -> Tensor:
    """Attention mask (B, 1, last - first, last) for queries ``first : last``.

    A padding position attends to itself alone: a row of the mask with no entry would give NaN.
    """
    queries = torch.arange(first, last, device=padding.device)[:, None]
    keys = torch.arange(last, device=padding.device)[None]
    real = keys >= padding[:, None, None]  # (B, 1, last)
    return ((real & (keys <= queries)) | (keys == queries))[:, None]


@torch.inference_mode()
def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Collection[int],
    should_stop: ShouldStop = never_stop,
    is_enough: Callable[[Sequence[int]], bool] | None = None,
) -> list[Completion]:
    """Continue every prompt (ids, BOS included) as it would be continued alone.

    Args:
        is_enough: whether a completion, given its ids so far, needs no more; not for beam search.

    Raises:
        Stopped: ``should_stop`` said so, between two tokens.
    """
    if sampling.num_beams > 1:
        assert is_enough is None, "a beam is known to be the best only at its end"
        return [_beam_search(model, prompt, sampling, eos_ids, should_stop) for prompt in prompts]
    width = max(map(len, prompts))
    # Prompts are padded on the left to one width.
    missing = [width - len(prompt) for prompt in prompts]
    padding = torch.tensor(missing, device=model.device)  # (B,)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=model.device)
    cache = _new_cache(model, len(prompts), width + sampling.max_new_tokens)
    generators = [torch.Generator().manual_seed(derived_seed(sampling.seed, "sampling")) for _ in prompts]
    chosen: list[list[int]] = [[] for _ in prompts]
    finished = [""] * len(prompts)  # the reason of each finished row
    while True:
        if should_stop():
            raise Stopped("stopped while generating")
        start, end = cache.length, cache.length + input_ids.shape[1]
        positions = (torch.arange(start, end, device=model.device)[None] - padding[:, None]).clamp(min=0)
        mask = _visible(padding, start, end) if any(missing) else None  # the causal mask is enough
        logits = model(input_ids, positions, mask, cache, read=_next_logits)  # (B, V)
        tokens = next_tokens(logits.float(), sampling, generators)
        for row, token in enumerate(tokens):
            if finished[row]:
                continue
            if token in eos_ids:
                finished[row] = "eos"
                continue
            chosen[row].append(token)
            if is_enough is not None and is_enough(chosen[row]):
                finished[row] = "stop"
            elif len(chosen[row]) == sampling.max_new_tokens:
                finished[row] = "length"
        if all(finished):
            return list(map(Completion, chosen, finished))
        input_ids = torch.tensor(tokens, device=model.device)[:, None]


def _beam_search(
    model: Transformer, prompt: Sequence[int], sampling: Sampling, eos_ids: Collection[int], should_stop: ShouldStop
) -> Completion:
    """The likeliest completion of ``num_beams`` beams, by mean log-probability per new token.

    The search ends when no unfinished beam can still beat the worst of ``num_beams`` finished ones.
    """
    beams, vocabulary = sampling.num_beams, model.config.vocab_size
    cache = _new_cache(model, beams, len(prompt) + sampling.max_new_tokens)
    input_ids = torch.tensor([list(prompt)] * beams, device=model.device)
    # All beams start equal: only the first may be extended, or they would stay equal.
    scores = torch.full((beams,), -torch.inf, device=model.device)
    scores[0] = 0.0
    unfinished: list[list[int]] = [[] for _ in range(beams)]
    finished: list[tuple[float, list[int]]] = []
    for count in range(1, sampling.max_new_tokens + 1):
        if should_stop():
            raise Stopped("stopped while generating")
        logits = model(input_ids, cache=cache, read=_next_logits).float()  # (beams, V)
        total = (scores[:, None] + logits.log_softmax(-1)).reshape(-1)
        # Enough to fill the unfinished beams even if every EOS takes a place in each.
        best = total.topk(min(max(2, 1 + len(eos_ids)) * beams, len(total)))
        kept: list[tuple[float, int, int]] = []
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(index, vocabulary)
            if token in eos_ids:
                if rank < beams:
                    finished.append((score / count, unfinished[beam]))
            elif len(kept) < beams:
                kept.append((score, beam, token))
        finished = sorted(finished, key=lambda beam: -beam[0])[:beams]
        unfinished = [[*unfinished[beam], token] for _, beam, token in kept]
        if not kept or (len(finished) == beams and kept[0][0] / count <= finished[-1][0]):
            break
        scores = torch.tensor([score for score, _, _ in kept], device=model.device)
        cache.reorder([beam for _, beam, _ in kept])
        input_ids = torch.tensor([[token] for _, _, token in kept], device=model.device)
    else:
        finished += [(score / count, ids) for (score, _, _), ids in zip(kept, unfinished, strict=True)]
    ids = max(finished, key=lambda beam: beam[0])[1]
    return Completion(ids, "length" if len(ids) == sampling.max_new_tokens else "eos")
