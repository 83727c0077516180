"""``llamatune generate``: completions of prompts, before and after tuning."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llamatune.command_options.inference import GenerateOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._several_ranks import connect, wait_for_first
from llamatune.launch_variables import Launch
from llamatune.output_files import output_file, write_output

if TYPE_CHECKING:
    from llamatune.inference.generate import Generations
    from llamatune.inference.prompt_files import Prompt


def generate(options: GenerateOptions, console: Console, launch: Launch) -> None:
    """Complete prompts."""
    if options.output is not None and options.prompt_file is None and launch.rank == 0:
        output_file(options.output, options.overwrite)
    prompts = _prompts(options, console) if launch.world_size == 1 else []  # at once, before torch is imported
    with connect(launch, options.device) as ranks:
        if launch.world_size > 1:
            prompts = wait_for_first(ranks, lambda: _prompts(options, console)) or []
        with console:
            from llamatune.inference.generate import generate as run_generation
            from llamatune.inference.generate import result_line
            from llamatune.strict_json import dump_json_lines

            is_continued = options.prompt_file is not None
            generations = run_generation(
                options,
                prompts,
                options,
                options.template,
                console.on_event,
                console.should_stop,
                ranks,
                options.stop,
                options.output if is_continued else None,
                options.overwrite,
                options.lookup,
            )
            if not ranks.is_first:  # which alone has the prompts
                return
            several = options.num_return_sequences
            results = [
                result_line(made, prompts[place // several], several, options.compare)
                for place, made in enumerate(generations.results)
            ]
            if options.output is not None and not is_continued:
                write_output(options.output, dump_json_lines(results), options.overwrite)
            payload = {"results": results, "tokens_per_second": generations.tokens_per_second}
            console.result(payload, lambda out: _print(out, generations, options.compare))


def _prompts(options: GenerateOptions, console: Console) -> list[Prompt]:
    from llamatune.inference.prompt_files import given_prompts, piped_prompt

    return given_prompts(options, console.on_event) or [piped_prompt(sys.stdin.buffer)]


def _print(out: RichConsole, generations: Generations, compare: bool) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    if compare:
        headings = ("prompt", "base", "tuned")
        table = Table(*(Column(heading, overflow="fold", ratio=1) for heading in headings), show_lines=True)
        for result in generations.results:
            texts = (result.prompt, result.base_completion, result.completion)
            table.add_row(*(text or "" for text in texts))
        out.print(table)
    else:
        for place, result in enumerate(generations.results):
            if result.sequence == 1:
                if place:
                    out.print("=====")
                out.print(result.prompt)
            out.print(f"> {result.completion}")
        out.print()
    out.print(Text(f"{generations.tokens_per_second:,.1f} tokens/s", style="dim"))
