"""The tables of a report: settings, figures, spikes, epochs, specs that differ, answers, parameters, memory, data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import yaml

from llamatune.formats.text_table import TextTable
from llamatune.inference.prepared_prompts import HEADINGS
from llamatune.reporting.report_data import Report, RunReport
from llamatune.reporting.report_text import (
    ABSENT,
    PARAMETERS,
    cause_of_spike,
    figure_rows,
    loss,
    optional,
    two_places,
    whole,
)
from llamatune.reporting.sample_answers import Samples
from llamatune.reporting.spikes import Spike
from llamatune.units import duration, gibibytes

MANY_RUNS = 4
"""From so many runs on, a page is about their number and not their names, and has what they share once."""
_MOST_ROWS_NAMED = 24


def shared(report: Report, make: Callable[[RunReport], TextTable]) -> list[TextTable]:
    """The table of each run; one that is the same for several runs comes once, under all their names."""
    runs: dict[TextTable, list[str]] = {}
    for run in report.runs:
        made = make(run)
        runs.setdefault(replace(made, title=made.title.removeprefix(f"{run.name}: ")), []).append(run.name)
    return [replace(made, title=f"{names_of(report, names)}: {made.title}") for made, names in runs.items()]


def names_of(report: Report, names: Sequence[str]) -> str:
    """The names of runs, or that it is all of many."""
    return "all runs" if MANY_RUNS <= len(names) == len(report.runs) else ", ".join(names)


def settings_table(report: Report) -> TextTable:
    """What was run, a column a run."""
    labels = dict.fromkeys(label for run in report.runs for label in run.settings)
    rows = ((label, *(run.settings.get(label, ABSENT) for run in report.runs)) for label in labels)
    return TextTable("Settings", ("", *_names(report)), tuple(rows), wide=True, name="settings")


def settings_tables(report: Report) -> list[TextTable]:
    """The settings; of many runs those that all share, and those that differ, a column a run."""
    made = settings_table(report)
    if len(report.runs) < MANY_RUNS:
        return [made]
    same = tuple(row[:2] for row in made.rows if len(set(row[1:])) == 1)
    differ = tuple(row for row in made.rows if len(set(row[1:])) > 1)
    shared_by_all = replace(made, title="Settings of all runs", header=("", "all runs"), rows=same)
    return [shared_by_all, replace(made, title="Settings that differ", rows=differ)]


def figures_table(report: Report) -> TextTable:
    """What came out, a column a run; the numbers of parameters are among the settings."""
    rows = [("status", *(run.status for run in report.runs))]
    rows += [(label, *values) for label, values in figure_rows([run.figures for run in report.runs], PARAMETERS)]
    return TextTable("Final figures", ("", *_names(report)), tuple(rows), name="final-figures")


def differences_table(report: Report) -> TextTable:
    """Fields of the specs that are not the same in all runs."""
    names = _names(report)
    rows = [(field, *(_value(row[name]) for name in names)) for field, row in report.spec_differences.items()]
    title = "Fields that are not the same in all runs"
    return TextTable(title, ("field", *names), tuple(rows), wide=True, name="differences")


def _names(report: Report) -> list[str]:
    return [run.name for run in report.runs]


def _value(value: object) -> str:
    return ABSENT if value is None else str(yaml.safe_dump(value, default_flow_style=True, width=1000)).splitlines()[0]


def spikes_table(run: RunReport) -> TextTable:
    """Each spike, with its rows and likely cause."""
    headings = (
        "peak at step", "epoch", "loss", "usual before", "gradient norm before clipping", "usual before",
        "learning rate", "steps", "likely cause", "rows of the window",
    )  # fmt: skip
    return TextTable("Spikes", headings, tuple(map(_spike, run.diagnosis.spikes)), name="spikes")


def _spike(spike: Spike) -> tuple[str, ...]:
    rows = "the prepared data is needed to name them"
    if spike.rows is not None:
        more = len(spike.rows) - _MOST_ROWS_NAMED
        rows = ", ".join(map(str, spike.rows[:_MOST_ROWS_NAMED])) + (f" and {more} more" if more > 0 else "")
    losses = (loss(spike.loss), loss(spike.typical_loss))
    norms = (f"{norm:.3g}" for norm in (spike.grad_norm, spike.typical_grad_norm))
    steps = f"{spike.first_step:,} to {spike.last_step:,}" + ("" if spike.recovered else ", not over")
    rate = f"{spike.learning_rate:.3g}"
    return whole(spike.step), str(spike.epoch), *losses, *norms, rate, steps, cause_of_spike(spike), rows


def epochs_table(run: RunReport) -> TextTable:
    """Losses and perplexities of each epoch."""
    of_validation = ("validation loss", "perplexity")
    validated = any(epoch.validation_loss is not None for epoch in run.epochs)
    headings = ("epoch", "updates", "training loss", "perplexity", *(of_validation if validated else ()),
                "target tokens", "ended at")  # fmt: skip
    rows = []
    for epoch in run.epochs:
        name = f"{epoch.epoch}" + ("" if epoch.complete else " (part)")
        training = (loss(epoch.train_loss), two_places(epoch.train_perplexity))
        validation = (optional(epoch.validation_loss, loss), optional(epoch.validation_perplexity, two_places))
        ended = (whole(epoch.target_tokens), duration(epoch.elapsed_s))
        rows.append((name, whole(epoch.steps), *training, *(validation if validated else ()), *ended))
    return TextTable(f"{run.name}: epochs", headings, tuple(rows), name="epochs")


def parameters_table(run: RunReport) -> TextTable:
    """Parameters of the base and of the adapter by module."""
    counts = [(name, facts["base"], facts["adapter"]) for name, facts in run.parameters.items()]
    if counts:
        counts.append(("all", sum(base for _, base, _ in counts), sum(adapter for *_, adapter in counts)))
    rows = [(name, whole(base), whole(adapter) if adapter else "") for name, base, adapter in counts]
    title = f"{run.name}: parameters, all blocks together"
    return TextTable(title, ("module", "base", "adapter"), tuple(rows), name="parameters")


def memory_table(run: RunReport) -> TextTable:
    """Every size that was measured or planned."""
    rows = [(key.removesuffix("_bytes").replace("_", " "), gibibytes(x), whole(x)) for key, x in run.memory.items()]
    return TextTable(f"{run.name}: memory", ("", "size", "bytes"), tuple(rows), name="memory")


def ranks_table(run: RunReport) -> TextTable:
    """What each of several ranks measured."""
    forms: dict[str, Callable[[float], str]] = {
        "peak_memory_bytes": gibibytes, "tokens_per_second": whole, "wait_share": "{:.1%}".format,
    }  # fmt: skip
    rows = [
        (str(number), *(optional(rank.get(key), form) for key, form in forms.items()))
        for number, rank in enumerate(run.ranks)
    ]
    headings = ("rank", "peak memory", "tokens/s of its own", "time in messages")
    return TextTable(f"{run.name}: ranks", headings, tuple(rows), name="ranks")


def data_table(run: RunReport) -> TextTable:
    """Counts of the prepared data."""
    rows = [(key.replace("_", " "), whole(x) if isinstance(x, int) else x) for key, x in run.data.items()]
    return TextTable(f"{run.name}: {run.spec['data']['train']}", ("", "count"), tuple(rows), name="data")


def answers_table(answers: Samples) -> TextTable:
    """A line a prompt: where it is from, its instruction, the row's answer, the base's and the tuned one."""
    rows = []
    for number, sample in enumerate(answers.samples, 1):
        place = f"{HEADINGS[sample.split]}, row {sample.row}" if sample.split else f"{sample.row or number}"
        rows.append(
            (place, sample.instruction or sample.prompt, sample.reference or "", sample.base or "", sample.tuned)
        )
    header = ("row", "instruction", "reference", "base", "tuned")
    return TextTable(f"{answers.source}: answers", header, tuple(rows), wide=True, name="answers")


def timelines_table(run: RunReport) -> TextTable:
    """A line an answer to ``evaluation.prompts``: the prompt's number and text, after what, and the answer."""
    rows, notes = [], []
    for number, found in enumerate(run.answers, 1):
        asked = found.instruction or found.prompt
        rows += [(str(number), asked, *line) for line in found.lines()]
        notes += [f"prompt {number}: {found.note}"] if found.note else []
    header = ("number", "prompt", "after", "answer")
    title = f"{run.name}: answers while it trained"
    return TextTable(title, header, tuple(rows), notes=tuple(notes), wide=True, name="answers-while-training")


_OF_ONE_RUN: tuple[Callable[[RunReport], TextTable], ...] = (
    spikes_table, epochs_table, timelines_table, parameters_table, memory_table, ranks_table, data_table,
)  # fmt: skip


def report_tables(report: Report) -> dict[str, TextTable]:
    """Every table that has rows, by the name of its files; of several runs a run's own end in its place, from 1."""
    found = {made.name: made for made in (settings_table(report), figures_table(report), differences_table(report))}
    for place, run in enumerate(report.runs, 1):
        for make in _OF_ONE_RUN:
            made = make(run)
            found[f"{made.name}-{place}" if len(report.runs) > 1 else made.name] = made
    found |= {made.name: made for made in report.evidence}
    found |= {f"answers-{place}": answers_table(samples) for place, samples in enumerate(report.samples, 1)}
    return {name: made for name, made in found.items() if made.rows}
