"""``make_report``: reads run directories, diagnoses them, and writes one HTML page (and a PNG)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamatune.command_options.training import ReportOptions
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.prompt_files import given_prompts
from llamatune.output_files import output_file, refuse_inside, refuse_replacing, write_output
from llamatune.reporting.averages import running_average
from llamatune.reporting.chart_images import chart_svg, charts_png, require_matplotlib
from llamatune.reporting.charts import Curve, make_charts
from llamatune.reporting.html_page import render_page
from llamatune.reporting.report_data import Report, report_run, spec_differences
from llamatune.reporting.run_reader import name_runs, read_run
from llamatune.reporting.sample_answers import generate_samples, read_generations
from llamatune.training.run_file_names import ADAPTER, BEST, CHECKPOINTS, METRICS, MODEL, ORIGIN, SPEC, SUMMARY

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
    for made in (output, picture):
        if made is not None:
            _refuse_files_of_runs(made, options.runs)
    runs = [read_run(path, name) for path, name in zip(options.runs, name_runs(options.runs), strict=True)]
    samples = [] if options.generations is None else [read_generations(options.generations)]
    if prompts:
        samples += [generate_samples(run, prompts, options, on_event, should_stop) for run in runs]
    reports, curves = [], []
    for place, run in enumerate(runs):
        smoothed = running_average([step.loss for step in run.metrics.steps], options.smoothing)
        data = report_run(run, smoothed)
        reports.append(data)
        curves.append(Curve(run, place, smoothed, data.epochs, data.diagnosis.spikes))
    png = None if options.png is None else str(options.png)
    report = Report(str(options.output), png, options.smoothing, reports, spec_differences(runs), samples)
    charts = make_charts(curves)
    page = render_page(report, [(chart, chart_svg(chart)) for chart in charts], curves)
    write_output(output, page.encode(), options.overwrite)
    if picture is not None:
        legend = {curve.run.name: curve.style for curve in curves}
        write_output(picture, charts_png(charts, legend), options.overwrite)
    return report


def _refuse_files_of_runs(output: Path, runs: Sequence[Path]) -> None:
    """A page may be inside of a run's directory, but not among what the run writes."""
    for run in runs:
        refuse_replacing(output, [("RUN", run / name) for name in _OF_A_RUN])
        refuse_inside(output, [("RUN", run / name) for name in _OF_A_RUN])
