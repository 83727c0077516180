"""``llamatune demo``: preparing, training, comparing and merging in a few minutes, on data in the package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.command_options.training import DemoOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import printable

if TYPE_CHECKING:
    from llamatune.demo.run_demo import DemoReport

_SHOWN = 8


def demo(options: DemoOptions, console: Console) -> None:
    """Run the whole job on a tiny model: prepare, count, train, compare, merge, report."""
    console.log_every_steps = 10
    with console:
        from llamatune.demo.run_demo import run_demo

        report = run_demo(options.output, console.on_event, console.should_stop)
        console.result(asdict(report), lambda out: _print(out, report))


def _print(out: RichConsole, report: DemoReport) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from llamatune.units import duration, gibibytes

    answers = Table(title="answers before and after LoRA", title_justify="left", show_lines=True)
    answers.add_column("question about a town that training never asked about", ratio=4)
    answers.add_column("expected", ratio=2)
    answers.add_column("base", ratio=5)
    answers.add_column("tuned", ratio=2)
    for row in report.held_out[:_SHOWN]:
        style = "green" if row.tuned == row.expected else "red"
        base, tuned = (printable(answer.strip()) for answer in (row.base, row.tuned))
        answers.add_row(row.question, row.expected, Text(base, style="dim"), Text(tuned, style=style))
    out.print(answers)

    models = (Column(model, justify="right") for model in ("base", "tuned", "merged"))
    scores = Table(f"of {len(report.held_out)} held-out questions", *models)
    exact = (report.base_exact_match, report.tuned_exact_match, report.merged_exact_match)
    contained = (report.base_contains, report.tuned_contains, report.merged_contains)
    for label, shares in (("the answer is the expected one", exact), ("it contains the expected one", contained)):
        scores.add_row(label, *(f"{share:.1f} %" for share in shares))
    out.print(scores)
    out.print(
        "The base was trained on the text of an invented atlas, without questions. It goes on writing where an answer "
        "ends, so none of its answers is exact; some contain the right one."
    )
    out.print(
        f"trained {report.trainable_parameters:,} parameters on top of {report.base_parameters:,} "
        f"in {duration(report.training_s)}, peak memory {gibibytes(report.peak_memory_bytes)}"
    )
    _print_next(out, report)


def _print_next(out: RichConsole, report: DemoReport) -> None:
    """What to do now. Lines are not broken, so that commands can be pasted."""
    import shlex

    place = Path(report.output)
    model, spec, other = (shlex.quote(str(place / name)) for name in ("merged", "run.yaml", "run-r2"))
    steps = {
        "look at the loss curve, in a browser": report.report,
        "ask the tuned model yourself": f"llamatune chat --model {model} --temperature 0",
        "train with another setting": f"llamatune train {spec} lora.r=2 training.output_dir={other}",
        "train your own model on your own rows": "the same verbs: README, 'The job, on LLaMA-2-7B'",
    }
    out.print("\nnext:")
    for what, how in steps.items():
        out.print(f"  {what}:\n    {printable(how)}", soft_wrap=True, markup=False, highlight=False)
