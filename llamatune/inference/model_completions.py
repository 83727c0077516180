"""Completions of a tuned model, and beside them those of its base where the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from llamatune.command_options.inference import Sampling
from llamatune.devices import free_memory_bytes
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import completions
from llamatune.inference.model_source import LoadedModels
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.inference.running_sequences import IsEnough
from llamatune.model.transformer import Transformer
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE, ROWS_OF_STREAMED, rows_that_fit


def completions_by_model(
    loaded: LoadedModels,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Collection[int],
    rows: int | None,
    should_stop: ShouldStop = never_stop,
    is_enough: IsEnough | None = None,
    make_lookup: Callable[[], PromptLookup | None] = lambda: None,
    on_event: OnEvent = ignore_event,
) -> Iterator[tuple[Completion, ...]]:
    """As ``engine.completions``, of each model in the order of ``loaded.by_prefix``; ``rows`` of each at a time.

    By default as many as suit the device. There are fewer, with a notice, where keys and values of so many would not
    fit into free memory. Base and tuned model that share their weights share passes. With beams, each has its own.
    """
    models = list(loaded.by_prefix.values())
    usual = ROWS_OF_STREAMED if loaded.idle is not None else ROWS_AT_ONCE[models[0].device.type]
    rows = min(rows or usual, max(1, len(prompts) * sampling.num_return_sequences))
    if loaded.idle is None and sampling.num_beams == 1 and prompts:  # else all ranks make the same passes
        fitting = _rows_that_fit(models, prompts, sampling)
        if fitting < rows:
            on_event(
                Notice(f"{fitting} completions at once, since keys and values of {rows} would not fit into memory")
            )
            rows = fitting
    if loaded.switch is None or sampling.num_beams > 1:
        of_models = [
            completions(model, prompts, sampling, eos_ids, rows, should_stop, is_enough, make_lookup(), None, on_event)
            for model in models
        ]
        yield from zip(*of_models, strict=True)
        return
    made = completions(
        models[0], prompts, sampling, eos_ids, 2 * rows, should_stop, is_enough, make_lookup(), loaded.switch, on_event
    )
    try:
        yield from zip(made, made, strict=True)
    finally:
        loaded.switch.reset()  # the tuned model is computed alone again


def _rows_that_fit(models: Sequence[Transformer], prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """Of completions at their longest."""
    tokens, model = max(map(len, prompts)) + sampling.max_new_tokens, models[0]
    free, draws = free_memory_bytes(model.device), sampling.temperature > 0
    return rows_that_fit(model.config, model.product_dtype.itemsize, tokens, draws, free, len(models))
