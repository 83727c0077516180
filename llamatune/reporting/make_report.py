"""``make_report``: reads run directories, diagnoses them, and writes one HTML page (and a PNG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.errors import SpecError
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.files import output_file, write_atomic
from llamatune.reporting.averages import running_average
from llamatune.reporting.chart_images import chart_svg, charts_png, require_matplotlib
from llamatune.reporting.charts import Curve, make_charts
from llamatune.reporting.html_page import render_page
from llamatune.reporting.report_data import Report, report_run, spec_differences
from llamatune.reporting.run_reader import name_runs, read_run
from llamatune.reporting.sample_answers import generate_samples, read_generations

if TYPE_CHECKING:
    from llamatune.inference.answer import Prompt


@dataclass(frozen=True)
class ReportOptions:
    """Inputs and outputs. ``smoothing`` is the decay of the running average, from 0 (none) to below 1.

    ``prompts`` are answered by the base and the trained weights of each run; ``generations`` is a file of answers.
    """

    runs: Sequence[Path]
    output: Path
    png: Path | None = None
    smoothing: float = 0.95
    prompts: Sequence[Prompt] = ()
    generations: Path | None = None
    max_new_tokens: int = 128
    device: str = "auto"
    overwrite: bool = False


def make_report(
    options: ReportOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Report:
    """Write the page (and the PNG) and return its data; torch is loaded only for prompts and the rows of spikes.

    Raises:
        SpecError: an option is out of bounds, or a run is given twice. CheckpointError: not a run directory.
        EnvironmentFault: matplotlib is missing, or an output exists already.
    """
    if not 0 <= options.smoothing < 1:
        raise SpecError(f"--smoothing is {options.smoothing}", None, "give a number from 0 to below 1")
    if options.png is not None and options.png.resolve() == options.output.resolve():
        raise SpecError("--png and --output are the same file", options.output)
    require_matplotlib()
    output = output_file(options.output, options.overwrite)
    picture = None if options.png is None else output_file(options.png, options.overwrite)
    runs = [read_run(path, name) for path, name in zip(options.runs, name_runs(options.runs), strict=True)]
    samples = [] if options.generations is None else [read_generations(options.generations)]
    for run in runs if options.prompts else ():
        samples.append(
            generate_samples(run, options.prompts, options.max_new_tokens, options.device, on_event, should_stop)
        )
    reports = [report_run(run, options.smoothing) for run in runs]
    curves = []
    for place, (run, data) in enumerate(zip(runs, reports, strict=True)):
        smoothed = running_average([step.loss for step in run.metrics.steps], options.smoothing)
        curves.append(Curve(run, place, smoothed, data.epochs, data.diagnosis.spikes))
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
        legend = {curve.run.name: curve.style for curve in curves}
        write_atomic(picture, charts_png(charts, legend), options.overwrite)
    return report
