"""``llamatune count-params``: parameters in closed form, without weights and without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamatune.command_options.inspection import DEFAULT_RANK, DEFAULT_TARGET_MODULES, CountOptions
from llamatune.commands._console import Console, RichConsole

if TYPE_CHECKING:
    from llamatune.shapes.counts import ParameterCount


def count_params(options: CountOptions, console: Console) -> None:
    """Count a model's parameters and those that LoRA trains."""
    with console:
        from llamatune.checkpoints.adapter_header import read_adapter_header
        from llamatune.checkpoints.model_directory import detect_format, read_config, warn_of_missing_head
        from llamatune.errors import SpecError
        from llamatune.shapes.adapter import AdapterSpec
        from llamatune.shapes.counts import count_parameters
        from llamatune.shapes.llama_config import LINEAR_MODULES
        from llamatune.shapes.presets import preset

        if (model := options.model) is not None:
            config = read_config(model, console.on_event, options.variant)
            warn_of_missing_head(model, detect_format(model), config, console.on_event)
        else:
            config = preset(options.preset or "")
        if options.adapter is not None:
            header = read_adapter_header(options.adapter)
            adapter, others = header.spec, header.others
        else:
            rank = DEFAULT_RANK if options.r is None else options.r
            names = (DEFAULT_TARGET_MODULES if options.target_modules is None else options.target_modules).split(",")
            targets = LINEAR_MODULES if names == ["all-linear"] else tuple(name.strip() for name in names)
            adapter, others = AdapterSpec(rank, rank, target_modules=targets), ()
        unknown = [name for name in adapter.modules if name not in LINEAR_MODULES]
        if unknown:
            todo = f"there are {', '.join(LINEAR_MODULES)}"
            raise SpecError(f"no linear layer called {unknown[0]!r}", "--target-modules", todo)
        count = count_parameters(config, adapter, others)
        payload = {
            "base_parameters": count.base_parameters,
            "trainable_parameters": count.trainable_parameters,
            "total_parameters": count.total_parameters,
            "trainable_percent": round(count.trainable_percent, 4),
            "reduction_percent": round(count.reduction_percent, 2),
            "r": adapter.r,
            "target_modules": list(adapter.target_modules),
            "modules": {name: dict(facts) for name, facts in count.modules.items()},
        }
        console.result(payload, lambda out: _print_count(out, count))


def _print_count(out: RichConsole, count: ParameterCount) -> None:
    from rich.table import Column, Table

    table = Table("module (all blocks together)", Column("base", justify="right"), Column("adapter", justify="right"))
    for name, facts in count.modules.items():
        table.add_row(name, f"{facts['base']:,}", f"{facts['adapter']:,}" if facts["adapter"] else "")
    table.add_section()
    adapter_parameters = count.total_parameters - count.base_parameters
    table.add_row("all", f"{count.base_parameters:,}", f"{adapter_parameters:,}")
    out.print(table)
    out.print(count.familiar_line())
    out.print(
        f"{count.reduction_percent:.2f} % fewer trained parameters than the {count.base_parameters:,} of the base"
    )
