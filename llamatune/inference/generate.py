"""Text generation: prompts in, completions out, of a tuned model alone or beside its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from time import monotonic
from typing import Any

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.chat_template_files import own_chat_template
from llamatune.data.segments import Segments, prompt_of_json
from llamatune.data.templates import Template
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import completions
from llamatune.inference.model_source import open_model
from llamatune.inference.prompt_encoding import PromptEncoder, is_chat, shown_answer
from llamatune.inference.prompt_files import Prompt
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.inference.stop_texts import StopTexts
from llamatune.ranks import ALONE, Ranks
from llamatune.shared_work import share_generating

_ROWS = 16


@dataclass(frozen=True)
class Generation:
    """One prompt as the model saw it, and its completion; ``base_completion`` is the untuned model's.

    ``sequence`` counts the completions of a prompt from 1.
    """

    prompt: str
    completion: str
    completion_ids: list[int]
    finish_reason: str
    base_completion: str | None = None
    sequence: int = 1


@dataclass(frozen=True)
class Generations:
    """All completions, in the order of the prompts and their sequences, and the speed of the (tuned) model."""

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
    stop: Sequence[str] = (),
    lookup: bool = False,
) -> Generations:
    """Load, generate, decode. ``template``, or its name or file; None is the one stored with the adapter or model.

    A completion ends where one of the texts ``stop`` appears, and is shown up to there; not for beam search.
    ``lookup``: tokens are drafted from the text so far where a single completion runs and it is faster.

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
    beams, config, several = sampling.num_beams, opened.checkpoint.config, sampling.num_return_sequences
    total, stops = len(ids) * several, StopTexts(tokenizer, stop) if stop else None
    advice = opened.memory_advice("use fewer --max-new-tokens")
    rows = beams if beams > 1 else min(_ROWS, total)
    with opened.computing(rows, advice, on_event):
        models = opened.load(on_event, should_stop).by_prefix
        eos_ids = encoder.stop_ids(config)

        def run(name: str, task: str) -> tuple[list[Completion], float]:
            started, done = monotonic(), list[Completion]()

            def completed(part: Sequence[list[int]], should_stop: ShouldStop) -> Iterator[tuple[Any, ...]]:
                is_enough = None if stops is None else stops.is_enough
                model, drafts = models[name], PromptLookup() if lookup and not in_slices else None
                made = completions(model, part, sampling, eos_ids, _ROWS, should_stop, is_enough, drafts)
                return map(astuple, made)

            in_slices = source.placement == "shard"  # whose ranks must compute the same passes, whatever the time
            for values in share_generating(ids, completed, _ROWS, should_stop, ranks, in_slices):
                done.append(Completion(*values))
                on_event(Progress(task, len(done), total))
            return done, sum(len(completion.ids) for completion in done) / max(monotonic() - started, 1e-9)

        asked_of = [(prompt, own) for prompt, own in zip(shown, ids, strict=True) for _ in range(several)]

        def text(asked: tuple[Segments, list[int]], made: Completion) -> str:
            if stops is not None and made.finish_reason == "stop":
                return stops.shown_answer(*asked, made.ids)
            return shown_answer(tokenizer, *asked, made.ids)

        base_texts: Sequence[str | None] = [None] * total
        if source.compare:
            base_texts = list(map(text, asked_of, run("base_", "generating with the base")[0]))
        answers, speed = run("", "generating")
    results = [
        Generation(asked[0].shown, text(asked, made), made.ids, made.finish_reason, base_text, place % several + 1)
        for place, (asked, made, base_text) in enumerate(zip(asked_of, answers, base_texts, strict=True))
    ]
    return Generations(results, speed)
