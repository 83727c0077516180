"""``llamatune plan-memory``: the predicted peak memory of a run. Neither weights nor torch are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamatune.command_options.memory import PlanMemoryOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._generation_plan import plan_generation_memory, print_remedies


def plan_memory(options: PlanMemoryOptions, console: Console) -> None:
    """Predict the peak memory of a run or of generation, what else would fit, and what would lower the peak."""
    if options.generate:
        plan_generation_memory(options, console)
        return
    with console:
        from llamatune.checkpoints.model_directory import read_config
        from llamatune.errors import SpecError
        from llamatune.path_expansion import expand_path
        from llamatune.requests import plan_of_training
        from llamatune.shapes.presets import preset
        from llamatune.spec import build_spec, load_spec
        from llamatune.spec_overrides import refuse_twice

        given = list(options.arguments)
        fields = {
            "training.micro_batch_size": options.micro_batch_size,
            "lora.r": options.r,
            "lora.target_modules": options.target_modules,
        }
        changes = [f"{key}={value}" for key, value in fields.items() if value is not None]
        if options.preset is not None:
            config = preset(options.preset)
            refuse_twice(given + changes)
            values = {"model": {"path": options.preset}, "lora": {}, "data": {"train": "none"}}
            spec = build_spec(values | {"training": {"output_dir": "none"}}, "--preset", given + changes)
        elif given:
            spec = load_spec(Path(expand_path(given[0])), given[1:] + changes)
            config = read_config(Path(spec.model.path), variant=spec.model.variant)
        else:
            raise SpecError("neither a spec nor --preset", todo="for example --preset llama-2-7b")
        facts = plan_of_training(
            spec,
            config,
            memory_bytes=options.memory_bytes,
            device=options.device,
            ranks=options.ranks,
            row_tokens=options.max_seq_length,
            prepared=options.preset is None,
            explain=options.explain,
            on_event=console.on_event,
        )
        console.result(facts, lambda out: print_memory_plan(out, facts))


def print_memory_plan(out: RichConsole, facts: dict[str, Any]) -> None:
    """The table of a plan, and below it what fits or what would lower the peak."""
    from rich.table import Column, Table

    from llamatune.units import gibibytes

    title = f"a step of {facts['pass_tokens']:,} tokens at a time, {facts['device']}"
    table = Table("at its peak", Column("memory", justify="right"), title=title, title_justify="left")
    for name, size in facts["predicted_memory_bytes"].items():
        table.add_row(name.replace("_", " "), gibibytes(size))
    table.add_section()
    table.add_row("all", gibibytes(facts["predicted_peak_memory_bytes"]))
    out.print(table)
    if "moments" in facts:
        _print_moments(out, facts["moments"])
    layers = facts["recomputed_layers"]
    if layers is not None and any(count for name, count in layers.items() if name != "nothing"):
        shown = ", ".join(f"{name} in {count}" for name, count in layers.items() if count)
        out.print(f"layers recompute {shown}")
    if "tokens_that_hide_it" in facts:
        brought, tokens = gibibytes(facts["bytes_brought_per_pass"]), facts["tokens_that_hide_it"]
        rates = "at 25 GB/s and 400 TFLOP/s"
        out.print(f"placement {facts['placement']}: a pass brings in {brought}; {tokens:,} tokens hide that {rates}")
    if facts["memory_limit_bytes"] is None:
        return
    verdict = "fits" if facts["fits"] else "does not fit"
    out.print(f"{verdict} into {gibibytes(facts['memory_limit_bytes'])}")
    batch, tokens = facts["largest_micro_batch_size"], facts["largest_row_tokens"]
    if tokens:
        sizes = f"micro_batch_size {batch:,}, or rows" if batch else "rows"
        out.print(f"largest that fit: {sizes} of {tokens:,} tokens")
    else:
        out.print("nothing fits: not a row of one token")
    print_remedies(out, facts["remedies"])


def _print_moments(out: RichConsole, moments: list[dict[str, Any]]) -> None:
    """A row for each moment, the peak marked, and the tensors that are alive at the peak."""
    from rich.table import Column, Table

    from llamatune.units import gibibytes

    title = "moments of the step, in its order; alike layers where they are highest"
    kinds = ("gradients", "activations", "temporary")
    sizes = (Column(heading, justify="right") for heading in (*kinds, "all"))
    table = Table("pass", "layers", "part", "moment", *sizes, title=title, title_justify="left")
    alive: dict[str, int] = {}
    for moment in moments:
        step = moment["step"]
        if "alive" in moment:
            step, alive = f"{step} <- peak", moment["alive"]
        held = (gibibytes(size) for size in (*(moment["memory_bytes"][kind] for kind in kinds), moment["bytes"]))
        table.add_row(moment["phase"], _ranges(moment["layers"]), moment["part"], step, *held)
    out.print(table)
    table = Table(title="alive at the peak", title_justify="left", show_header=False)
    for name, size in sorted(alive.items(), key=lambda item: -item[1]):
        table.add_row(name, gibibytes(size))
    out.print(table)


def _ranges(layers: list[int]) -> str:
    """``0-30`` or ``0, 2, 4``."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
