"""``llamatune generate``: completions of prompts, before and after tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llamatune.options.inference import GenerateOptions

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.inference.generate import Generations
    from llamatune.inference.prompt_files import Prompt


def generate(
    options: GenerateOptions,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Complete prompts."""
    prompts = _prompts(options)

    from dataclasses import asdict

    from llamatune.commands._console import Console
    from llamatune.durable_writing import output_file, write_atomic
    from llamatune.strict_json import dump_json_lines

    output = None if options.output is None else output_file(options.output, options.overwrite)
    with Console(json_mode, writes=False) as console:
        from llamatune.inference.generate import generate as run_generation

        generations = run_generation(options, prompts, options, options.template, console.on_event, console.should_stop)
        results = [asdict(generation) for generation in generations.results]
        if not options.compare:
            for result in results:
                del result["base_completion"]
        if output is not None:
            write_atomic(output, dump_json_lines(results), options.overwrite)
        payload = {"results": results, "tokens_per_second": generations.tokens_per_second}
        console.result(payload, lambda out: _print(out, generations, options.compare))


def _prompts(options: GenerateOptions) -> list[Prompt]:
    from llamatune.commands._input_text import read_standard_input
    from llamatune.errors import SpecError

    if options.prompt or options.prompt_file is not None:
        from llamatune.inference.prompt_files import given_prompts

        return given_prompts(options.prompt, options.prompt_file)
    text = read_standard_input().removesuffix("\n")
    if not text:
        raise SpecError("no prompt", "standard input", "pass --prompt TEXT, --prompt-file FILE, or pipe a prompt in")
    return [text]


def _print(out: RichConsole, generations: Generations, compare: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if compare:
        table = Table(show_lines=True)
        for heading in ("prompt", "base", "tuned"):
            table.add_column(heading, overflow="fold", ratio=1)
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
    from llamatune.errors import printable

    return "".join(c if c in "\n\t" else printable(c) for c in text)
