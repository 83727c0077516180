"""``llamatune plan-memory``: what a run will need, in closed form; no weights are loaded, and torch neither."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.memory.sizes import Rows
    from llamatune.shapes.config import LlamaConfig
    from llamatune.spec import RunSpec


def plan_memory(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC.yaml] [KEY=VALUE ...]",
            help="A run spec (not with --preset) and changes to it.",
            show_default=False,
        ),
    ] = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="A published shape, such as llama-2-7b.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The device's memory, such as 40GiB; 90 % of it is used.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu, where other attention kernels run.")] = "cuda",
    micro_batch_size: Annotated[
        int | None,
        typer.Option("--micro-batch-size", metavar="N", help="Rows in one forward pass.", show_default=False),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            "--max-seq-length",
            metavar="N",
            help="Tokens of a row, in place of the prepared data's.",
            show_default=False,
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", metavar="R", help="Rank of the adapter.", show_default=False)] = None,
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", metavar="NAMES", help="A comma list, or all-linear.", show_default=False),
    ] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Predict the peak memory of a run, what else would fit, and what helps where it does not."""
    from llamatune.commands._arguments import as_utf8
    from llamatune.commands._console import Console

    with Console(json_mode, writes=False) as console:
        from llamatune.checkpoints.model_directory import read_config
        from llamatune.errors import SpecError
        from llamatune.events import Notice
        from llamatune.memory import plan as planning
        from llamatune.memory.outlook import outlook
        from llamatune.paths import expand_home
        from llamatune.shapes.config import preset
        from llamatune.spec import build_spec, load_spec, refuse_twice
        from llamatune.units import parse_size

        given = [as_utf8(text, "an argument") for text in arguments or []]
        if device not in ("cuda", "cpu"):
            raise SpecError(f"--device is cuda or cpu, not {device!r}")
        options = (
            ("training.micro_batch_size", micro_batch_size),
            ("lora.r", r),
            ("lora.target_modules", target_modules),
        )
        changes = [f"{key}={value}" for key, value in options if value is not None]
        if preset_name is not None:
            config = preset(preset_name)
            refuse_twice(given + changes)
            values = {"model": {"path": preset_name}, "lora": {}, "data": {"train": "none"}}
            spec = build_spec(values | {"training": {"output_dir": "none"}}, "--preset", given + changes)
        elif given:
            spec = load_spec(Path(expand_home(given[0])), given[1:] + changes)
            config = read_config(Path(spec.model.path))
        else:
            raise SpecError("neither a spec nor --preset", todo="for example --preset llama-2-7b")
        config = config.with_layers(spec.model.num_layers)
        rows, note = _rows(spec, config, max_seq_length, preset_name is None)
        if note:
            console.on_event(Notice(note))
        limit = planning.limit_of(spec, None if memory is None else parse_size(memory, "--memory"))
        cuda = device == "cuda"
        facts = outlook(spec, config, planning.plan_memory(spec, config, rows, cuda, limit), cuda)
        console.result(facts, lambda out: print_memory_plan(out, facts))


def _rows(spec: RunSpec, config: LlamaConfig, max_seq_length: int | None, has_data: bool) -> tuple[Rows, str | None]:
    """The heaviest micro-batch: of the prepared data where it is there, else of rows of equal length."""
    from llamatune.errors import SpecError
    from llamatune.formats.prepared import read_lengths
    from llamatune.memory.plan import heaviest_rows

    if max_seq_length is not None and not 1 <= max_seq_length <= 1 << 20:
        raise SpecError(f"rows of {max_seq_length} tokens", "--max-seq-length", "a length from 1 to 1048576 is needed")
    prepared = Path(spec.data.train)
    if max_seq_length is None and has_data and (prepared / "train.safetensors").is_file():
        return heaviest_rows(*read_lengths(prepared), spec), None
    tokens = max_seq_length or min(512, config.max_position_embeddings)
    note = f"planned for rows of {tokens} tokens, all of them targets"
    samples = spec.training.micro_batch_size * max(1, spec.data.packed_tokens // tokens if spec.data.packing else 1)
    return heaviest_rows([tokens] * samples, [tokens] * samples, spec), note


def print_memory_plan(out: RichConsole, facts: dict[str, Any]) -> None:
    """The table of a plan, and below it what fits or what helps."""
    from rich.table import Table

    from llamatune.units import gibibytes

    table = Table(
        title=f"a step of {facts['micro_batch_tokens']:,} tokens at a time, {facts['device']}", title_justify="left"
    )
    table.add_column("at its peak")
    table.add_column("memory", justify="right")
    for name, size in facts["predicted_memory_bytes"].items():
        table.add_row(name.replace("_", " "), gibibytes(size))
    table.add_section()
    table.add_row("all", gibibytes(facts["predicted_peak_memory_bytes"]))
    out.print(table)
    layers = facts["recomputed_layers"]
    if layers is not None and any(count for name, count in layers.items() if name != "nothing"):
        shown = ", ".join(f"{name} in {count}" for name, count in layers.items() if count)
        out.print(f"layers recompute {shown}", markup=False)
    if facts["memory_limit_bytes"] is None:
        return
    verdict = "fits" if facts["fits"] else "does not fit"
    out.print(f"{verdict} into {gibibytes(facts['memory_limit_bytes'])}", markup=False)
    out.print(
        f"largest that fit: micro_batch_size {facts['largest_micro_batch_size']:,}, "
        f"or rows of {facts['largest_row_tokens']:,} tokens",
        markup=False,
    )
    if facts["remedies"]:
        out.print("what helps, the cheapest first:", markup=False)
    for remedy in facts["remedies"]:
        more = remedy["more_compute"]
        cost = f", {100 * more:.0f} % more computation" if more else ""
        end = "fits" if remedy["fits"] else "not enough alone"
        line = f"  {remedy['change']}: {gibibytes(remedy['peak_bytes'])}, {end} ({remedy['effect']}{cost})"
        out.print(line, markup=False, soft_wrap=True)
