"""``llamatune generate``: completions of prompts, before and after tuning."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.command_options.inference import GenerateOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect, wait_for_first
from llamatune.errors import printable
from llamatune.launch_variables import Launch

if TYPE_CHECKING:
    from llamatune.inference.generate import Generations
    from llamatune.inference.prompt_files import Prompt


def generate(options: GenerateOptions, console: Console, launch: Launch) -> None:
    """Complete prompts."""
    prompts, output = _opened(options) if launch.world_size == 1 else ([], None)  # at once, before torch is imported
    with connect(launch, options.device) as ranks:
        if launch.world_size > 1:
            prompts, output = wait_for_first(ranks, lambda: _opened(options)) or ([], None)
        with console:
            from llamatune.durable_writing import write_atomic
            from llamatune.inference.generate import generate as run_generation
            from llamatune.strict_json import dump_json_lines

            generations = run_generation(
                options, prompts, options, options.template, console.on_event, console.should_stop, ranks
            )
            results = [asdict(generation) for generation in generations.results]
            if not options.compare:
                for result in results:
                    del result["base_completion"]
            if output is not None:
                write_atomic(output, dump_json_lines(results), options.overwrite)
            payload = {"results": results, "tokens_per_second": generations.tokens_per_second}
            console.result(payload, lambda out: _print(out, generations, options.compare))


def _opened(options: GenerateOptions) -> tuple[list[Prompt], Path | None]:
    """The prompts, and the file to write if there is one, which may be written."""
    from llamatune.durable_writing import output_file
    from llamatune.inference.prompt_files import given_prompts, piped_prompt

    prompts = given_prompts(options.prompt, options.prompt_file) or [piped_prompt(sys.stdin.buffer)]
    return prompts, None if options.output is None else output_file(options.output, options.overwrite)


def _print(out: RichConsole, generations: Generations, compare: bool) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    if compare:
        headings = ("prompt", "base", "tuned")
        table = Table(*(Column(heading, overflow="fold", ratio=1) for heading in headings), show_lines=True)
        for result in generations.results:
            texts = (result.prompt, result.base_completion, result.completion)
            table.add_row(*(Text(_shown(text or "")) for text in texts))
        out.print(table)
    else:
        for result in generations.results:
            out.print(Text(_shown(result.prompt)))
            out.print(Text(f"> {_shown(result.completion)}"))
            out.print()
    out.print(Text(f"{generations.tokens_per_second:,.1f} tokens/s", style="dim"))


def _shown(text: str) -> str:
    """Text for a terminal: line breaks and tabs stay, other control characters are escaped."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)
