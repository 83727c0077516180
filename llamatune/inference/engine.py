"""Decoding engine: batched token generation with a KV cache, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.inference.beam_search import beam_search
from llamatune.inference.completion import Completion, last_logits, new_cache
from llamatune.inference.sampling import next_tokens
from llamatune.model.attention import windowed
from llamatune.model.transformer import Transformer
from llamatune.seeds import derived_seed


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
        return [beam_search(model, prompt, sampling, eos_ids, should_stop) for prompt in prompts]
    width, device = max(map(len, prompts)), model.device
    # Prompts are padded on the left to one width.
    missing = [width - len(prompt) for prompt in prompts]
    padding = torch.tensor(missing, device=device)  # (B,)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    cache = new_cache(model, len(prompts), width + sampling.max_new_tokens)
    generators = [torch.Generator().manual_seed(derived_seed(sampling.seed, "sampling")) for _ in prompts]
    chosen: list[list[int]] = [[] for _ in prompts]
    finished = [""] * len(prompts)  # the reason of each finished prompt
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    while True:
        if should_stop():
            raise Stopped("stopped while generating")
        start, end = cache.length, cache.length + input_ids.shape[1]
        positions = (torch.arange(start, end, device=device)[None] - padding[:, None]).clamp(min=0)
        mask = None  # the causal mask is enough
        if any(missing):
            mask = windowed(_visible(padding, start, end), model.config.sliding_window, start, end - start, device)
        logits = model(input_ids, positions, mask, cache, read=last_logits)  # (B, V)
        tokens = next_tokens(logits.float(), sampling, generators)
        for row, token in zip(rows, tokens, strict=True):
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
        going_on = [place for place, row in enumerate(rows) if not finished[row]]
        if not going_on:
            return list(map(Completion, chosen, finished))
        if 2 * len(going_on) <= len(rows):
            # A finished row costs as much as another. The batch halves, so all copies together are less than one of it.
            first = min(missing[place] for place in going_on)
            cache.keep_rows(going_on, first)
            missing = [missing[place] - first for place in going_on]
            padding = torch.tensor(missing, device=device)
            rows, tokens = [rows[place] for place in going_on], [tokens[place] for place in going_on]
            generators = [generators[place] for place in going_on]
        input_ids = torch.tensor(tokens, device=device)[:, None]
