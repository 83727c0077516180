"""``llamatune plan-memory --generate``: predicted peak memory of ``generate``. Neither weights nor torch are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamatune.command_options.inference import Sampling
from llamatune.command_options.memory import ASSUMED_PROMPT_TOKENS, PlanMemoryOptions
from llamatune.commands._console import Console, RichConsole

if TYPE_CHECKING:
    from llamatune.memory.generation import HeldModel, Work
    from llamatune.shapes.adapter import AdapterSpec


def plan_generation_memory(options: PlanMemoryOptions, console: Console) -> None:
    """Predict the peak memory of generating, what else would fit, and what would lower the peak."""
    with console:
        from llamatune.memory.generation_report import generation_report

        model = _model(options, console)
        limit = None if options.memory_bytes is None else options.memory_bytes * 9 // 10
        facts = generation_report(model, _work(options, model, console), limit)
        console.result(facts, lambda out: print_generation_plan(out, facts))


def _model(options: PlanMemoryOptions, console: Console) -> HeldModel:
    """The model of a directory, a spec or a preset, with the adapter that is given or that the spec describes."""
    import dataclasses

    from llamatune.checkpoints.adapter_header import read_adapter_header
    from llamatune.checkpoints.model_directory import read_config, stored_dtype
    from llamatune.errors import SpecError
    from llamatune.events import Notice
    from llamatune.memory.generation import HeldModel
    from llamatune.path_expansion import expand_path
    from llamatune.shapes.dtypes import QUANTIZED_DTYPES
    from llamatune.shapes.presets import preset
    from llamatune.spec import load_spec

    given, changes = list(options.arguments), _adapter_changes(options)
    path = Path(expand_path(given[0])) if given else None
    is_spec = path is not None and options.preset is None and not path.is_dir()
    if len(given) > (options.preset is None) and not is_spec:
        raise SpecError(f"{given[-1]!r} changes a run spec, and none is given", todo="give the spec, or leave it out")
    adapter: AdapterSpec | None = None
    stored: str | None = None
    if options.preset is not None:
        config = preset(options.preset)
    elif path is None:
        raise SpecError("neither a model directory, a spec nor --preset", todo="for example --preset llama-2-7b")
    elif is_spec:
        spec = load_spec(path, given[1:] + changes)
        model, variant = Path(spec.model.path), spec.model.variant
        config, stored = read_config(model, variant=variant), stored_dtype(model, variant)
        config, adapter = config.with_layers(spec.model.num_layers), spec.adapter
    else:
        config, stored = read_config(path), stored_dtype(path)
    if adapter is None and changes:
        adapter = _counted_adapter(options)
    replaces = bool(adapter and adapter.whole)
    if options.adapter is not None:
        header = read_adapter_header(options.adapter)
        adapter, replaces = header.spec, bool(header.others)
        config = dataclasses.replace(config, vocab_size=header.rows(config))
    if options.compare and adapter is None:
        raise SpecError("--compare needs two models", None, "give the tuned one with --adapter")
    dtype: str = "same" if options.dtype is None else options.dtype
    if stored is None and dtype == "same":
        stored = "bfloat16"
        console.on_event(Notice("planned for weights in bfloat16; --dtype says another"))
    if dtype in QUANTIZED_DTYPES:
        others = "bfloat16"
    else:
        dtype = others = stored if dtype == "same" and stored else dtype
        if options.dtype in (None, "same") and dtype == "float16" and options.device == "cpu":
            dtype = others = "float32"  # as generate computes it there
    cuda = options.device != "cpu"
    return HeldModel(config, dtype, others, stored or others, adapter, replaces, cuda)


def _adapter_changes(options: PlanMemoryOptions) -> list[str]:
    fields = {"lora.r": options.r, "lora.target_modules": options.target_modules}
    return [f"{key}={value}" for key, value in fields.items() if value is not None]


def _counted_adapter(options: PlanMemoryOptions) -> AdapterSpec | None:
    """Of ``--r`` and ``--target-modules`` on a model without a spec."""
    from llamatune.spec import build_spec

    values = {"model": {"path": "none"}, "lora": {}, "data": {"train": "none"}, "training": {"output_dir": "none"}}
    return build_spec(values, "--generate", _adapter_changes(options)).adapter


def _work(options: PlanMemoryOptions, model: HeldModel, console: Console) -> Work:
    from llamatune.events import Notice
    from llamatune.memory.generation import Work

    tokens = options.prompt_tokens
    if tokens is None:
        tokens = min(ASSUMED_PROMPT_TOKENS, model.config.max_position_embeddings)
        console.on_event(Notice(f"planned for prompts of {tokens} tokens"))
    return Work(
        prompt_tokens=tokens,
        new_tokens=options.max_new_tokens or Sampling.max_new_tokens,
        rows=options.batch_size,
        prompts=options.prompts,
        beams=options.num_beams or 1,
        draws=options.temperature != 0,
        compare=options.compare,
    )


def print_generation_plan(out: RichConsole, facts: dict[str, Any]) -> None:
    """The table of a plan, a column for each moment, and below it what fits or what would lower the peak."""
    from rich.table import Column, Table

    from llamatune.units import gibibytes

    moments, peak = facts["moments"], facts["predicted_peak_memory_bytes"]
    work = f"{facts['prompt_tokens']:,} + {facts['max_new_tokens']:,} tokens"
    beams = f"{facts['num_beams']} beams" if facts["num_beams"] > 1 else f"{facts['rows']:,} rows"
    title = f"{beams} of {work}, {facts['dtype']}, {facts['device']}"
    headings = [f"{moment['step']}{' <- peak' * (moment['bytes'] == peak)}" for moment in moments]
    table = Table("", *(Column(heading, justify="right") for heading in headings), title=title, title_justify="left")
    for name in facts["predicted_memory_bytes"]:
        table.add_row(name.replace("_", " "), *(gibibytes(moment["memory_bytes"][name]) for moment in moments))
    table.add_section()
    table.add_row("all", *(gibibytes(moment["bytes"]) for moment in moments))
    out.print(table)
    each = "the beams' row" if facts["num_beams"] > 1 else "each row"
    out.print(f"the cache has room for {facts['room_tokens']:,} tokens in {each}")
    if facts["memory_limit_bytes"] is None:
        return
    verdict = "fits" if facts["fits"] else "does not fit"
    out.print(f"{verdict} into {gibibytes(facts['memory_limit_bytes'])}")
    largest = {
        "rows": facts["largest_rows"],
        "new tokens": facts["largest_max_new_tokens"],
        "tokens in a prompt": facts["largest_prompt_tokens"],
    }
    shown = [f"{size:,} {name}" for name, size in largest.items() if size]
    out.print(f"largest that fit, each by itself: {', '.join(shown) or 'none'}")
    print_remedies(out, facts["remedies"])


def print_remedies(out: RichConsole, remedies: list[dict[str, Any]]) -> None:
    """A line for each, if there are any."""
    from llamatune.units import gibibytes

    if remedies:
        out.print("what helps, the cheapest first:")
    for remedy in remedies:
        more = remedy["more_compute"]
        cost = f", {100 * more:.0f} % more computation" if more else ""
        end = "fits" if remedy["fits"] else "not enough alone"
        line = f"  {remedy['change']}: {gibibytes(remedy['peak_bytes'])}, {end} ({remedy['effect']}{cost})"
        out.print(line, soft_wrap=True)
