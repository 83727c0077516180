"""Text generation: prompts in, completions out, of a tuned model alone or beside its base."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from llamatune.command_options.generation import Lookup, Merge
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.chat_template_files import own_chat_template
from llamatune.data.model_compatibility import check_fingerprint
from llamatune.data.segments import prompt_of_json
from llamatune.data.templates import Template
from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.answer_log import ENTRIES_AT_ONCE, open_answer_log
from llamatune.formats.prepared import read_prepared_manifest
from llamatune.inference.answer_settings import generation_settings, model_settings
from llamatune.inference.completion import Completion
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import open_model
from llamatune.inference.prepared_prompts import PreparedPrompt, PreparedRows, draw_prompts
from llamatune.inference.prompt_encoding import PromptEncoder, is_chat, shown_answer
from llamatune.inference.prompt_files import FilePrompt, Prompt
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.inference.stop_texts import StopTexts
from llamatune.output_files import is_stream
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE
from llamatune.shared_work import refuse_differences, share_generating


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
    """All completions, in the order of the prompts and their sequences; the first rank has them as ``lines`` of output.

    The speed is of what this call computed, with both models where they are compared.
    """

    results: list[Generation]
    tokens_per_second: float
    lines: list[dict[str, Any]]


def generate(
    source: ModelSource,
    prompts: Sequence[Prompt] | PreparedRows,
    sampling: Sampling,
    template: str | Template | ChatTemplate | None = None,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
    stop: Sequence[str] = (),
    output: Path | None = None,
    overwrite: bool = False,
    lookup: Lookup = "off",
    merge: Merge = "off",
) -> Generations:
    """Load, generate, decode. ``template``, or its name or file; None is the one stored with the adapter or model.

    The prompts of ``PreparedRows`` are in a template, and drawn by the seed.
    A completion ends where one of the texts ``stop`` appears, and is shown up to there; not for beam search.
    ``lookup``: tokens are drafted from the text so far where a single completion runs and it is faster. ``merge``:
    ``OpenedModel.merges``.

    Several ranks share batches of prompts, which the first gives; each has all completions. Ranks that hold slices of
    the weights compute every batch together.

    Results are added to ``output`` in order as they come. Where it has the first of them, the others are computed.

    Raises:
        SpecError: a template that has no place for a prompt, or too few prepared rows.
        DataError: a prompt, or a prepared directory, that cannot be used.
        CheckpointError: model, tokenizer or adapter cannot be used or do not belong together.
        EnvironmentFault: the output is of other prompts or settings, or cannot be written.
        Stopped: ``should_stop`` said so; with an output the same call goes on.
    """
    opened = open_model(source, on_event, ranks, merge)
    tokenizer = opened.tokenizer()
    chosen, ends = None, set[int]()
    if isinstance(prompts, PreparedRows):
        assert template is None, "rows are prepared in a template"
        manifest = read_prepared_manifest(prompts.directory)
        refuse_differences({"content of --from-data": manifest.digest}, ranks)
        check_fingerprint(manifest.tokenizer_fingerprint, opened.tokenizer_path, source.force_base, on_event)
        ends |= set() if manifest.end_of_turn is None else {manifest.end_of_turn}
        prompts = draw_prompts(prompts, manifest, sampling.seed, tokenizer)
    else:
        chosen = opened.template(template, tokenizer, on_event)
        if chosen is None and template is None and ranks.from_first(any(map(is_chat, prompts))):
            chosen = own_chat_template(tokenizer, on_event=on_event)
            if chosen is not None:
                on_event(Notice(f"chats are put in the model's own template, of {chosen.where}"))
    encoder = PromptEncoder(tokenizer, chosen)
    asked = [encoder.segments(prompt, number).to_json() for number, prompt in enumerate(prompts, 1)]
    shown = [prompt_of_json(prompt) for prompt in ranks.from_first(asked)]
    ids = opened.encode(tokenizer, shown, sampling.max_new_tokens, on_event)
    several, compare = sampling.num_return_sequences, source.compare
    stops = StopTexts(tokenizer, stop) if stop else None
    total, is_enough = len(ids) * several, None if stops is None else stops.is_enough

    def text(place: int, made: Completion) -> str:
        asked = shown[place // several], ids[place // several]
        if stops is not None and made.finish_reason == "stop":
            return stops.shown_answer(*asked, made.ids)
        return shown_answer(tokenizer, *asked, made.ids)

    def result(place: int, made: Completion, base_text: str | None) -> Generation:
        prompt, sequence = shown[place // several].shown, place % several + 1
        return Generation(prompt, text(place, made), made.ids, made.finish_reason, base_text, sequence)

    def line(place: int, made: Generation) -> dict[str, Any]:
        return _line(made, prompts[place // several], several, compare)

    def lines(first: int = 0) -> list[dict[str, Any]]:
        """Of the results from ``first`` on."""
        return list(itertools.starmap(line, enumerate(results[first:], first))) if ranks.is_first else []

    results, tokens, speed = list[Generation](), 0, 0.0
    with contextlib.ExitStack() as stack:
        log = None
        if output is not None and ranks.is_first:
            of_model = model_settings(source, opened, tokenizer)
            settings = generation_settings(of_model, prompts, chosen, sampling, stop)
            log = stack.enter_context(open_answer_log(output, settings, overwrite))
            results += _kept(log.entries(), total, result, line, compare)
            del results[len(results) // several * several :]  # a prompt is completed as a whole
            log.keep(len(results))
            if results:
                on_event(Notice(f"{output} holds {len(results)} of {total} answers already"))
        results = [Generation(**values) for values in ranks.from_first(list(map(asdict, results)))]
        if len(results) == total:
            return Generations(results, speed, lines())
        is_beamed = sampling.num_beams > 1
        at_once = ranks.from_first(ENTRIES_AT_ONCE if is_beamed else ROWS_AT_ONCE[opened.device.type])
        written, rows = len(results), sampling.num_beams if is_beamed else min(at_once, total)
        advice = opened.memory_advice("use fewer --max-new-tokens")
        stack.enter_context(opened.computing(rows, advice, on_event))
        try:
            loaded = opened.load(on_event, should_stop, generates=True)
            eos_ids = encoder.stop_ids(opened.checkpoint.config) | ends

            def completed(part: Sequence[list[int]], should_stop: ShouldStop) -> Iterator[list[tuple[Any, ...]]]:
                has_lookup = lookup != "off" and not in_slices  # whose ranks make the same passes, whatever the time
                for of_models in completions_by_model(
                    loaded, part, sampling, eos_ids, None, should_stop, is_enough,
                    lambda: PromptLookup(lookup == "on") if has_lookup else None, on_event,
                ):  # fmt: skip
                    yield list(map(astuple, of_models))

            started, in_slices, todo = monotonic(), source.placement == "shard", ids[written // several :]
            for values in share_generating(todo, completed, at_once, should_stop, ranks, in_slices):
                made = {name: Completion(*each) for name, each in zip(loaded.by_prefix, values, strict=True)}
                base_text = text(len(results), made["base_"]) if compare else None
                results.append(result(len(results), made[""], base_text))
                tokens += sum(len(each.ids) for each in made.values())
                speed = tokens / max(monotonic() - started, 1e-9)
                if log is not None and len(results) - written == ENTRIES_AT_ONCE:
                    log.append(lines(written))
                    written = len(results)
                on_event(Progress("generating", len(results) // several, len(ids), speed))
        except Stopped:
            if output is None:
                raise
            what, advice = f"stopped after {len(results)} of {total} answers", "run the same command again"
            raise Stopped(what, output, None if is_stream(output) else advice) from None
        finally:
            if log is not None:
                log.append(lines(written))
    return Generations(results, speed, lines())


def _line(made: Generation, prompt: Prompt, several: int, compare: bool) -> dict[str, Any]:
    """A result as a line of output; ``several``: how many there are of a prompt."""
    left_out = [*([] if compare else ["base_completion"]), *(["sequence"] if several == 1 else [])]
    values = {name: value for name, value in asdict(made).items() if name not in left_out}
    return prompt.labelled(values) if isinstance(prompt, FilePrompt | PreparedPrompt) else values


def _kept(
    entries: Iterable[Any],
    total: int,
    result: Callable[[int, Completion, str | None], Generation],
    line: Callable[[int, Generation], dict[str, Any]],
    compare: bool,
) -> Iterator[Generation]:
    """The results in lines of an output, up to the first that would not have been written."""
    for place, entry in enumerate(itertools.islice(entries, total)):  # a stop leaves fewer; what is beyond is cut off
        try:
            made = Completion(entry["completion_ids"], entry["finish_reason"])
            kept = result(place, made, str(entry["base_completion"]) if compare else None)
            if line(place, kept) != entry:
                return
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            return
        yield kept
