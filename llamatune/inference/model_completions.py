"""Completions of a tuned model, and beside them those of its base where the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from llamatune.command_options.inference import Sampling
from llamatune.events import ShouldStop, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import IsEnough, completions
from llamatune.inference.model_source import LoadedModels
from llamatune.inference.prompt_lookup import PromptLookup


def completions_by_model(
    loaded: LoadedModels,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Collection[int],
    rows: int,
    should_stop: ShouldStop = never_stop,
    is_enough: IsEnough | None = None,
    make_lookup: Callable[[], PromptLookup | None] = lambda: None,
) -> Iterator[tuple[Completion, ...]]:
    """As ``engine.completions``, of each model in the order of ``loaded.by_prefix``; ``rows`` of each at a time.

    Base and tuned model that share their weights share passes. With beams, each has its own.
    """
    models = list(loaded.by_prefix.values())
    if loaded.switch is None or sampling.num_beams > 1:
        of_models = [
            completions(model, prompts, sampling, eos_ids, rows, should_stop, is_enough, make_lookup())
            for model in models
        ]
        yield from zip(*of_models, strict=True)
        return
    made = completions(
        models[0], prompts, sampling, eos_ids, 2 * rows, should_stop, is_enough, make_lookup(), loaded.switch
    )
    try:
        yield from zip(made, made, strict=True)
    finally:
        loaded.switch.reset()  # the tuned model is computed alone again
