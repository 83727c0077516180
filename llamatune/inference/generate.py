"""Text generation: prompts in, completions out, of a tuned model alone or beside its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from time import monotonic
from typing import Any

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.chat_template_files import own_chat_template
from llamatune.data.segments import prompt_of_json
from llamatune.data.templates import Template
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import complete
from llamatune.inference.model_source import open_model
from llamatune.inference.prompt_encoding import PromptEncoder, is_chat, shown_answer
from llamatune.inference.prompt_files import Prompt
from llamatune.ranks import ALONE, Ranks
from llamatune.shared_work import map_generating

_BATCH = 16


@dataclass(frozen=True)
class Generation:
    """One prompt as the model saw it, and its completion; ``base_completion`` is the untuned model's."""

    prompt: str
    completion: str
    completion_ids: list[int]
    finish_reason: str
    base_completion: str | None = None


@dataclass(frozen=True)
class Generations:
    """All completions, in the order of the prompts, and the speed of the (tuned) model."""

    results: list[Generation]
    tokens_per_second: float


def generate(
    source: ModelSource,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    template: str | Template | ChatTemplate | None = None,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
) -> Generations:
    """Load, generate, decode. ``template``, or its name or file; None is the one stored with the adapter or model.

    Several ranks share batches of prompts, which the first gives; each has all completions. Ranks that hold slices of
    the weights compute every batch together.

    Raises:
        SpecError: a template that has no place for a prompt.
        CheckpointError: model, tokenizer or adapter cannot be used or do not belong together.
    """
    opened = open_model(source, on_event, ranks)
    tokenizer = opened.tokenizer()
    chosen = opened.template(template, tokenizer, on_event)
    if chosen is None and template is None and ranks.from_first(any(map(is_chat, prompts))):
        chosen = own_chat_template(tokenizer, on_event=on_event)
        if chosen is not None:
            on_event(Notice(f"chats are put in the model's own template, of {chosen.where}"))
    encoder = PromptEncoder(tokenizer, chosen)
    asked = [encoder.segments(prompt, number).to_json() for number, prompt in enumerate(prompts, 1)]
    shown = [prompt_of_json(prompt) for prompt in ranks.from_first(asked)]
    ids = opened.encode(tokenizer, shown, sampling.max_new_tokens, on_event)
    beams, config = sampling.num_beams, opened.checkpoint.config
    advice, rows = "use a 16-bit --dtype, or fewer --max-new-tokens", beams if beams > 1 else min(_BATCH, len(ids))
    with opened.computing(rows, advice, on_event):
        models = opened.load(on_event, should_stop).by_prefix
        eos_ids = encoder.stop_ids(config)

        def run(name: str, task: str) -> tuple[list[Completion], float]:
            started, done, starts = monotonic(), list[Completion](), range(0, len(ids), _BATCH)

            def complete_batch(first: int, should_stop: ShouldStop) -> list[tuple[Any, ...]]:
                batch = ids[first : first + _BATCH]
                return [astuple(made) for made in complete(models[name], batch, sampling, eos_ids, should_stop)]

            for batch in map_generating(starts, complete_batch, should_stop, ranks, source.placement == "shard"):
                done += [Completion(*values) for values in batch]
                on_event(Progress(task, len(done), len(ids)))
            return done, sum(len(completion.ids) for completion in done) / max(monotonic() - started, 1e-9)

        base_texts: Sequence[str | None] = [None] * len(ids)
        if source.compare:
            answers = zip(shown, ids, run("base_", "generating with the base")[0], strict=True)
            base_texts = [shown_answer(tokenizer, asked, prompt, made.ids) for asked, prompt, made in answers]
        completions, speed = run("", "generating")
    results = [
        Generation(
            segments.shown, shown_answer(tokenizer, segments, prompt, made.ids), made.ids, made.finish_reason, base_text
        )
        for segments, prompt, made, base_text in zip(shown, ids, completions, base_texts, strict=True)
    ]
    return Generations(results, speed)
