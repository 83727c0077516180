"""``llamatune generate``: what the model says, before and after tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.inference.answer import Answers, Prompt


def generate(
    model: Annotated[
        Path, typer.Option(help="A model directory, Meta's or Hugging Face's.", show_default=False, readable=False)
    ],
    adapter: Annotated[Path | None, typer.Option(help="An adapter directory to put on it.", readable=False)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated. Without one, standard input is the prompt.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt a line, or rows in JSON or JSON Lines.", readable=False)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A template's name or file, or none; default: the one stored with the model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most that is generated.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 0.9,
    num_beams: Annotated[int, typer.Option(help="Beam search over so many beams.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer beside the tuned one.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the results to this JSONL file.", readable=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --output.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="Accept an adapter of another base.")] = False,
    dtype: Annotated[str, typer.Option(help="same, float32, bfloat16 or float16.")] = "same",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Complete prompts."""
    prompts = _prompts(prompt, prompt_file)

    from llamatune.errors import SpecError
    from llamatune.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, num_beams, seed)

    from dataclasses import asdict

    from llamatune.commands._console import Console
    from llamatune.files import dump_json_lines, output_file, write_atomic

    if output is not None:
        output = output_file(output, overwrite)
    with Console(json_mode, writes=False) as console:
        from llamatune.checkpoints.checkpoint import DTYPE_NAMES
        from llamatune.devices import choose_device
        from llamatune.inference.answer import Request, answer

        if dtype != "same" and dtype not in DTYPE_NAMES:
            raise SpecError(f"--dtype is same, {', '.join(DTYPE_NAMES)}, not {dtype!r}")
        held, on = DTYPE_NAMES.get(dtype), choose_device(device, console.on_event)
        request = Request(model, prompts, sampling, adapter, template, compare, force_base, held, on)
        answers = answer(request, console.on_event, console.should_stop)
        results = [asdict(found) for found in answers.results]
        if not compare:
            for found in results:
                del found["base_completion"]
        if output is not None:
            write_atomic(output, dump_json_lines(results), overwrite)
        payload = {"results": results, "tokens_per_second": answers.tokens_per_second}
        console.result(payload, lambda out: _print(out, answers, compare))


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[Prompt]:
    from llamatune.commands._arguments import given_prompts, read_standard_input
    from llamatune.errors import SpecError

    if prompts := given_prompts(prompt, prompt_file):
        return prompts
    text = read_standard_input().removesuffix("\n")
    if not text:
        raise SpecError("no prompt", "standard input", "pass --prompt TEXT, --prompt-file FILE, or pipe a prompt in")
    return [text]


def _print(out: RichConsole, answers: Answers, compare: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if compare:
        table = Table(show_lines=True)
        for heading in ("prompt", "base", "tuned"):
            table.add_column(heading, overflow="fold", ratio=1)
        for found in answers.results:
            table.add_row(
                *(Text(_shown(text or "")) for text in (found.prompt, found.base_completion, found.completion))
            )
        out.print(table)
    else:
        for found in answers.results:
            out.print(Text(_shown(found.prompt)))
            out.print(Text(f"> {_shown(found.completion)}"))
            out.print()
    out.print(Text(f"{answers.tokens_per_second:,.1f} tokens/s", style="dim"))


def _shown(text: str) -> str:
    """Text for a terminal: line breaks and tabs stay, other control characters are escaped."""
    from llamatune.errors import printable

    return "".join(c if c in "\n\t" else printable(c) for c in text)
