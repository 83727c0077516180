"""``make_report``: reads run directories, diagnoses them, and writes one HTML page (and charts and tables as files)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llamatune.command_options.training import ReportOptions
from llamatune.durable_writing import probe_writable, refuse_occupied, staged_directory, writing
from llamatune.errors import EnvironmentFault, printable
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.formats.text_table import TextTable
from llamatune.inference.prompt_files import given_prompts
from llamatune.output_files import output_file, refuse_inside, refuse_replacing, write_output
from llamatune.reporting.averages import decay_for, running_average
from llamatune.reporting.chart_images import IMAGE_KINDS, chart_files, chart_svg, charts_png, require_matplotlib
from llamatune.reporting.charts import level_values, make_charts, whole_legend
from llamatune.reporting.curves import Curve
from llamatune.reporting.evidence_tables import benchmark_tables, stored_evaluation_table
from llamatune.reporting.html_page import render_page
from llamatune.reporting.report_data import Report, report_run, spec_differences
from llamatune.reporting.report_tables import report_tables
from llamatune.reporting.run_reader import name_runs, read_run
from llamatune.reporting.sample_answers import (
    Samples,
    generate_rows,
    generate_samples,
    known_template,
    read_generations,
)
from llamatune.training.run_file_names import ADAPTER, BEST, CHECKPOINTS, METRICS, MODEL, ORIGIN, SPEC, SUMMARY

TABLE_KINDS = ("md", "tex")
_OF_A_RUN = (SPEC, METRICS, SUMMARY, ORIGIN, CHECKPOINTS, BEST, ADAPTER, MODEL)


def make_report(
    options: ReportOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Report:
    """Write the page (and the PNG) and return its data; torch is loaded only for prompts and the rows of spikes.

    Raises:
        SpecError: an option is out of bounds, or a run is given twice. CheckpointError: not a run directory.
        EnvironmentFault: matplotlib is missing, or an output exists already.
    """
    prompts = given_prompts(options, on_event, should_stop)
    require_matplotlib()
    output = output_file(options.output, options.overwrite)
    picture = None if options.png is None else output_file(options.png, options.overwrite)
    for made in (output, picture, options.charts, options.tables):
        if made is not None:
            _refuse_files_of_runs(made, options.runs)
    for made, endings in ((options.charts, IMAGE_KINDS), (options.tables, TABLE_KINDS)):
        if made is not None:
            _refuse_other_files(made, endings, options.overwrite)
    runs = [read_run(path, name) for path, name in zip(options.runs, name_runs(options.runs), strict=True)]
    evidence = [
        *_of_each(options.evaluation, lambda path, place: [stored_evaluation_table(path, f"evaluation-{place}")]),
        *_of_each(options.benchmark, lambda path, place: benchmark_tables(path, f"benchmark-{place}")),
    ]
    samples, notices = list[Samples](), dict[str, list[str]]()
    if options.generations is not None:
        samples.append(read_generations(options.generations, list(filter(None, map(known_template, runs)))))
    for run in runs if options.rows is not None else ():
        answered = generate_rows(run, options, on_event, should_stop)
        if isinstance(answered, Samples):
            samples.append(answered)
        else:
            notices[run.name] = [answered]
    if prompts:
        samples += [generate_samples(run, prompts, options, on_event, should_stop) for run in runs]
    reports, curves = [], []
    for place, run in enumerate(runs):
        losses = [step.loss for step in run.metrics.steps]
        decay = decay_for(len(losses)) if options.smoothing is None else options.smoothing
        smoothed = running_average(losses, decay)
        data = report_run(run, smoothed, decay, notices.get(run.name, []))
        reports.append(data)
        curves.append(Curve(run, place, smoothed, data.epochs, data.diagnosis.spikes))
    paths = {name: _text(getattr(options, name)) for name in ("png", "charts", "tables")}
    report = Report(
        output=str(options.output), **paths, smoothing=options.smoothing, runs=reports,
        spec_differences=spec_differences(runs), samples=samples, level=level_values(curves),
        evidence=evidence,
    )  # fmt: skip
    charts = make_charts(curves)
    for flag, made in (("--png", options.png), ("--charts", options.charts)):
        if made is not None and not charts:
            on_event(Notice(f"{flag} {made}: no chart in it, since no run has logged a step yet", "warning"))
    page = render_page(report, [(chart, chart_svg(chart)) for chart in charts], curves)
    write_output(output, page.encode(), options.overwrite)
    if picture is not None:
        write_output(picture, charts_png(charts, whole_legend(curves)), options.overwrite)
    if options.charts is not None:
        files = {f"{chart.name}.{kind}": made for chart in charts for kind, made in chart_files(chart).items()}
        _write_directory(options.charts, files, options.overwrite)
    if options.tables is not None:
        tables = report_tables(report)
        files = {f"{name}.md": table.markdown().encode() for name, table in tables.items()}
        files |= {f"{name}.tex": table.latex().encode() for name, table in tables.items()}
        _write_directory(options.tables, files, options.overwrite)
    return report


def _of_each(paths: Sequence[Path], tables: Callable[[Path, int], list[TextTable]]) -> list[TextTable]:
    """The tables of each path, whose titles begin with the path where there are several."""
    made = [(path, table) for place, path in enumerate(paths, 1) for table in tables(path, place)]
    if len(paths) < 2:
        return [table for _, table in made]
    return [replace(table, title=f"{printable(str(path))}: {table.title}") for path, table in made]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _write_directory(path: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    with staged_directory(path, overwrite) as staging:
        for name, content in sorted(files.items()):
            with writing(staging / name, len(content)) as file:
                file.write(content)


def _refuse_other_files(path: Path, endings: Sequence[str], overwrite: bool) -> None:
    """Raise unless a directory may be written; what is replaced holds nothing but files of these kinds."""
    refuse_occupied(path, overwrite)
    probe_writable(Path(os.path.realpath(path)).parent)
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.suffix.removeprefix(".") not in endings or not entry.is_file() or entry.is_symlink():
            raise EnvironmentFault(f"the directory holds something else: {entry.name}", path, "choose another one")


def _refuse_files_of_runs(output: Path, runs: Sequence[Path]) -> None:
    """A page may be inside of a run's directory, but not among what the run writes."""
    for run in runs:
        refuse_replacing(output, [("RUN", run / name) for name in _OF_A_RUN])
        refuse_inside(output, [("RUN", run / name) for name in _OF_A_RUN])
