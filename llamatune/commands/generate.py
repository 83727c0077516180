"""``llamatune generate``: completions of prompts, before and after tuning."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamatune.command_options.generation import GenerateOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect, wait_for_first
from llamatune.launch_variables import Launch
from llamatune.output_files import output_file

if TYPE_CHECKING:
    from llamatune.inference.prompt_files import Prompt


def generate(options: GenerateOptions, console: Console, launch: Launch) -> None:
    """Complete prompts."""
    is_continued = options.prompt_file is not None or options.from_data is not None
    if options.output is not None and not is_continued and launch.rank == 0:
        output_file(options.output, options.overwrite)
    prompts = _prompts(options, console) if launch.world_size == 1 else []  # at once, before torch is imported
    with connect(launch, options.device) as ranks:
        if launch.world_size > 1:
            prompts = wait_for_first(ranks, lambda: _prompts(options, console)) or []
        with console:
            from llamatune.requests import complete_prompts

            generations = complete_prompts(options, prompts, console.on_event, console.should_stop, ranks)
            if not ranks.is_first:
                return
            lines, speed = generations.lines, generations.tokens_per_second
            payload = {"results": lines, "tokens_per_second": speed}
            console.result(payload, lambda out: _print(out, lines, speed, options.compare))


def _prompts(options: GenerateOptions, console: Console) -> list[Prompt]:
    from llamatune.inference.prompt_files import given_prompts, piped_prompt

    given = given_prompts(options, console.on_event)
    return given or ([] if options.from_data is not None else [piped_prompt(sys.stdin.buffer)])


def _print(out: RichConsole, lines: Sequence[Mapping[str, Any]], speed: float, compare: bool) -> None:
    from rich.text import Text

    from llamatune.inference.answers_page import sections

    for number, (heading, part) in enumerate(sections(lines)):
        if heading is not None:
            out.print(Text("\n" * (number > 0) + heading, style="bold"))
        (_print_compared if compare else _print_completions)(out, part)
    out.print(Text(f"{speed:,.1f} tokens/s", style="dim"))


def _print_compared(out: RichConsole, lines: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Column, Table

    from llamatune.inference.answers_page import columns_of

    keys = {"prompt": "prompt", **columns_of(lines)}
    table = Table(*(Column(heading, overflow="fold", ratio=1) for heading in keys.values()), show_lines=True)
    for line in lines:
        table.add_row(*(line.get(key) or "" for key in keys))
    out.print(table)


def _print_completions(out: RichConsole, lines: Sequence[Mapping[str, Any]]) -> None:
    for place, line in enumerate(lines):
        if line.get("sequence", 1) == 1:
            if place:
                out.print("=====")
            out.print(line["prompt"])
            if "split" in line:
                out.print(f"reference: {line['reference']}")
        out.print(f"> {line['completion']}")
    out.print()
