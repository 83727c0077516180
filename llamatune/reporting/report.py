"""Run directories in, one self-contained page out, and the same figures as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llamatune.durable_writing import output_file, write_atomic
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.prompt_files import given_prompts
from llamatune.options.training import ReportOptions
from llamatune.reporting.charts import Curve, make_charts
from llamatune.reporting.contents import Report, report_run, spec_differences
from llamatune.reporting.curves import running_average
from llamatune.reporting.drawing import chart_svg, charts_png, require_matplotlib
from llamatune.reporting.page import render_page
from llamatune.reporting.run_log import name_runs, read_run
from llamatune.reporting.samples import generate_samples, read_generations


def make_report(
    options: ReportOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Report:
    """Read, judge, draw and write the page (and the picture); torch is loaded only for prompts and spikes' rows.

    Raises:
        SpecError: a run is given twice. CheckpointError: not a run directory.
        EnvironmentFault: matplotlib is missing, or an output is in the way.
    """
    prompts = given_prompts(options.prompt, options.prompt_file)
    require_matplotlib()
    output = output_file(options.output, options.overwrite)
    picture = None if options.png is None else output_file(options.png, options.overwrite)
    runs = [read_run(path, name) for path, name in zip(options.runs, name_runs(options.runs), strict=True)]
    samples = [] if options.generations is None else [read_generations(options.generations)]
    if prompts:
        samples += generate_samples(runs, prompts, options, on_event, should_stop)
    reports = [report_run(run, options.smoothing) for run in runs]
    curves = []
    for place, (run, found) in enumerate(zip(runs, reports, strict=True)):
        smoothed = running_average([step.loss for step in run.metrics.steps], options.smoothing)
        curves.append(Curve(run, place, smoothed, found.epochs, found.diagnosis.spikes))
    report = Report(
        str(options.output),
        None if options.png is None else str(options.png),
        options.smoothing,
        reports,
        spec_differences(runs),
        samples,
    )
    charts = make_charts(curves)
    page = render_page(report, [(chart, chart_svg(chart)) for chart in charts], curves)
    write_atomic(output, page.encode(), options.overwrite)
    if picture is not None:
        drawn = charts_png(charts, {curve.run.name: curve.style for curve in curves})
        write_atomic(picture, drawn, options.overwrite)
    return report


def report_as_json(report: Report) -> dict[str, Any]:
    """The report as one JSON object."""
    return asdict(report)
