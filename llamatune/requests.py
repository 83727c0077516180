"""Requests of verbs and of the Python API, carried out without printing: training, generation, evaluation, a plan.

What is heavy is imported when a request is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event

if TYPE_CHECKING:
    from llamatune.command_options.generation import GenerateOptions
    from llamatune.command_options.inference import EvaluateOptions
    from llamatune.inference.generate import Generations
    from llamatune.inference.prompt_files import Prompt
    from llamatune.ranks import Ranks
    from llamatune.shapes.attention_kernels import Gpu
    from llamatune.shapes.llama_config import LlamaConfig
    from llamatune.spec import RunSpec


def train_and_track(
    spec: RunSpec,
    resume: bool,
    overwrite: bool,
    force_base: bool,
    allowed_changes: tuple[str, ...],
    on_event: OnEvent,
    should_stop: ShouldStop,
    ranks: Ranks,
    began_s: float,
) -> dict[str, Any]:
    """Train, or continue a run, and send its metrics to the trackers of the spec; the summary, on every rank.

    ``began_s``: of ``training.max_time``, by ``time.monotonic``.
    """
    from llamatune.tracking.trackers import Trackers
    from llamatune.training.train import train

    trackers = Trackers(spec, on_event) if ranks.is_first else None
    with trackers or contextlib.nullcontext():
        return train(
            spec,
            resume=resume,
            overwrite=overwrite,
            force_base=force_base,
            allowed_changes=allowed_changes,
            on_event=trackers.on_event if trackers else on_event,
            should_stop=should_stop,
            ranks=ranks,
            began_s=began_s,
        )


def complete_prompts(
    options: GenerateOptions, prompts: Sequence[Prompt], on_event: OnEvent, should_stop: ShouldStop, ranks: Ranks
) -> Generations:
    """Complete the prompts, or the rows of ``options.from_data``; the first rank writes the output files."""
    from llamatune.inference.answers_page import answers_page
    from llamatune.inference.generate import generate
    from llamatune.inference.prepared_prompts import PreparedRows
    from llamatune.output_files import write_output
    from llamatune.strict_json import dump_json_lines

    is_continued = options.prompt_file is not None or options.from_data is not None
    rows = None if options.from_data is None else PreparedRows(options.from_data, options.rows)
    generations = generate(
        options,
        rows or prompts,
        options,
        options.template,
        on_event,
        should_stop,
        ranks,
        options.stop,
        options.output if is_continued else None,
        options.overwrite,
        options.lookup,
        options.merge,
    )
    if not ranks.is_first:  # which alone has the prompts
        return generations
    if options.output is not None and not is_continued:
        write_output(options.output, dump_json_lines(generations.lines), options.overwrite)
    if options.markdown is not None:
        page = answers_page(generations.lines, _facts_of_answers(options))
        write_output(options.markdown, page.encode(), options.overwrite)
    return generations


def _facts_of_answers(options: GenerateOptions) -> dict[str, object]:
    """What decided the answers, as a page of them says it."""
    drawn = "greedy" if options.temperature == 0 else f"temperature {options.temperature:g}, top-p {options.top_p:g}"
    return {
        "model": options.model,
        "adapter": ", ".join(map(str, options.adapters)) or None,
        "rows": options.from_data or options.prompt_file,
        "drawn": f"{options.num_beams} beams" if options.num_beams > 1 else drawn,
        "seed": options.seed,
        "at most": f"{options.max_new_tokens} new tokens",
    }


def evaluate_model(
    options: EvaluateOptions, on_event: OnEvent, should_stop: ShouldStop, ranks: Ranks
) -> dict[str, Any]:
    """Loss and token accuracy on prepared rows, or the accuracy of a task; the first rank writes the losses of rows."""
    if options.task is None:
        from llamatune.inference.evaluate import evaluate_prepared
        from llamatune.output_files import write_output
        from llamatune.strict_json import dump_json_lines

        report = evaluate_prepared(options, on_event, should_stop, ranks)
        if ranks.is_first and options.per_row is not None:
            write_output(options.per_row, dump_json_lines(report.per_row()), options.overwrite)
        return report.to_dict()
    from llamatune.data.row_sources import pipes_kept
    from llamatune.inference.gsm8k import evaluate_gsm8k

    files = [path for path in (options.data, options.shots_data) if path is not None]
    with pipes_kept(files, should_stop):
        return evaluate_gsm8k(options, on_event, should_stop, ranks)


def plan_of_training(
    spec: RunSpec,
    config: LlamaConfig,
    *,
    memory_bytes: int | None,
    device: str | None,
    ranks: int = 1,
    row_tokens: int | None = None,
    prepared: bool = True,
    explain: bool = False,
    on_event: OnEvent = ignore_event,
) -> dict[str, Any]:
    """The memory plan of a run, as JSON. Neither weights nor torch are loaded.

    Args:
        config: of the whole model; the spec says how many layers are kept.
        memory_bytes: of the device; None: of a CPU what is free here, as a run there takes it, of a GPU no limit.
        device: ``cuda`` or ``cpu``; None: that of the spec, a GPU where it says ``auto``.
        row_tokens: of every row, in place of the prepared data's.
        prepared: whether the spec's data may be read.
        explain: with the moments of the step.
    """
    from llamatune.host_memory import free_host_bytes
    from llamatune.memory.plan import limit_of
    from llamatune.memory.plan_report import explain as explain_plan
    from llamatune.memory.plan_report import plan_report
    from llamatune.memory.planned_run import plan_of_run

    config = config.with_layers(spec.model.num_layers)
    counts = _lengths(spec, config, row_tokens, prepared, on_event)
    gpu: Gpu = (device or spec.training.device) != "cpu"
    if memory_bytes is None and prepared and not gpu:
        memory_bytes = free_host_bytes()
    limit = limit_of(spec, memory_bytes)
    if limit is None and spec.training.tokens_per_pass == "auto":
        on_event(Notice("the memory is not known: planned as if a pass had one micro-batch; give it, as 24GiB"))
    spec, plan = plan_of_run(spec, config, *counts, gpu, limit, ranks)
    facts = plan_report(spec, config, plan, gpu)
    return facts | {"moments": explain_plan(spec, config, plan, gpu)} if explain else facts


def _lengths(
    spec: RunSpec, config: LlamaConfig, row_tokens: int | None, prepared: bool, on_event: OnEvent
) -> tuple[Sequence[int], Sequence[int]]:
    """Lengths and target tokens of the rows: of the prepared data if there is any, else of rows of equal length."""
    from llamatune.formats.prepared import read_lengths, split_path

    directories = spec.data.train_paths
    if row_tokens is None and prepared and all(split_path(path, "train").is_file() for path in directories):
        return read_lengths(*directories)
    tokens = row_tokens or min(512, config.max_position_embeddings)
    on_event(Notice(f"planned for rows of {tokens} tokens, all of them targets"))
    training = spec.training
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    lengths = [tokens] * (rows * max(1, spec.data.packed_tokens // tokens if spec.data.packing else 1))
    return lengths, lengths
