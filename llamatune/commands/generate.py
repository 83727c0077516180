"""``llamatune generate``: completions of prompts, before and after tuning."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from llamatune.commands._console import Console, RichConsole
from llamatune.errors import DataError, SpecError, printable
from llamatune.options.inference import GenerateOptions

if TYPE_CHECKING:
    from llamatune.inference.generate import Generations
    from llamatune.inference.prompt_files import Prompt

_LONGEST_INPUT = 16 << 20


def generate(options: GenerateOptions, console: Console) -> None:
    """Complete prompts."""
    prompts = _prompts(options)

    from llamatune.durable_writing import output_file, write_atomic
    from llamatune.strict_json import dump_json_lines

    output = None if options.output is None else output_file(options.output, options.overwrite)
    with console:
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
    if options.prompt or options.prompt_file is not None:
        from llamatune.inference.prompt_files import given_prompts

        return given_prompts(options.prompt, options.prompt_file)
    raw = sys.stdin.buffer.read(_LONGEST_INPUT + 1)
    if len(raw) > _LONGEST_INPUT:
        raise DataError(f"more than {_LONGEST_INPUT:,} bytes", "standard input", "pass prompts with --prompt-file")
    try:
        text = raw.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", "standard input") from None
    if not text:
        raise SpecError("no prompt", "standard input", "pass --prompt TEXT, --prompt-file FILE, or pipe a prompt in")
    return [text]


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
