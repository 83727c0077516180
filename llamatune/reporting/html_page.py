"""The HTML of the report's page: one file without scripts or links, all texts from files escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from string import Template

import yaml

from llamatune import __version__
from llamatune.reporting.chart_images import PALETTE, Chart
from llamatune.reporting.curves import MOST_LINE_POINTS, Curve
from llamatune.reporting.html_answers import answers_html, timeline_html
from llamatune.reporting.html_elements import Markup, breakable, element, html, section, table, unordered
from llamatune.reporting.report_data import Report, RunReport
from llamatune.reporting.report_tables import (
    MANY_RUNS,
    data_table,
    differences_table,
    epochs_table,
    figures_table,
    memory_table,
    names_of,
    parameters_table,
    ranks_table,
    settings_tables,
    shared,
    spikes_table,
)
from llamatune.reporting.report_text import findings

_PAGE = {"page": ("#ffffff", "#0d1117"), "panel": ("#f3f5f7", "#161b22"), "quiet": ("#57606a", "#9aa4af")}


def render_page(report: Report, charts: Sequence[tuple[Chart, str]], curves: Sequence[Curve]) -> str:
    """The whole page; ``charts`` are given with their SVG."""
    body = (
        _overview(report),
        section("Diagnosis", *(_diagnosis(run) for run in report.runs)),
        section("Curves", _legend(curves), _key(report, curves), _charts(charts), _level(report), class_="curves"),
        section("Epochs", *(table(epochs_table(run)) for run in report.runs)),
        section("Evaluation and benchmark", *map(table, report.evidence)),
        section("Before and after", answers_html(report.samples)),
        section(
            "Answers while it trained",
            *(timeline_html(run.name, *found) for run in report.runs for found in enumerate(run.answers, 1)),
        ),
        section("Differences between the specs", _differences(report)),
        section(
            "Parameters and memory",
            *(table(made) for make in (parameters_table, memory_table, ranks_table) for made in shared(report, make)),
        ),
        section("Data", *map(table, shared(report, data_table))),
        section("Specs and versions", *map(_spec, report.runs)),
        element("p", f"Made by llamatune {__version__}.", class_="quiet"),
    )
    return Template(_file("page.html")).substitute(
        title=html(_title(report)),
        heading=breakable(_title(report)),
        style=_colours() + _file("page.css"),
        body="\n".join(part for part in body if part),
    )


def _file(name: str) -> str:
    return resources.files("llamatune.reporting").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Every colour as a CSS variable, for light and dark pages."""
    colours = {**PALETTE, **_PAGE}.items()
    light, dark = (" ".join(f"--{name}: {pair[scheme]};" for name, pair in colours) for scheme in (0, 1))
    on_paper = f"@media print {{ :root {{ {light} color-scheme: light; }} }}"
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{on_paper}\n"


def _overview(report: Report) -> Markup:
    notices = unordered(_notices(report), class_="quiet")
    tables = (table(made) for made in (*settings_tables(report), figures_table(report)))
    return element("section", *tables, notices, class_="overview")


def _title(report: Report) -> str:
    names = [run.name for run in report.runs]
    return "Training report: " + (", ".join(names) if len(names) < MANY_RUNS else f"{len(names)} runs")


def _notices(report: Report) -> list[str]:
    """Each notice once, behind the names of the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for run in report.runs:
        for notice in run.notices:
            runs.setdefault(notice, []).append(run.name)
    return [f"{names_of(report, names)}: {notice}" for notice, names in runs.items()]


def _diagnosis(run: RunReport) -> Markup:
    said = unordered(findings(run.diagnosis), class_="findings")
    return Markup(element("h3", breakable(run.name)) + said + table(spikes_table(run)))


def _legend(curves: Sequence[Curve]) -> Markup:
    """Each run's name beside a line in its colour, with the name of its validation marker."""
    items = []
    for curve in curves:
        dashes = " ".join(str(3 * length) for length in curve.dashes)
        line = (
            f'<svg viewBox="0 0 44 12" aria-hidden="true"><path d="M0 6H44" stroke="var(--{curve.series})" '
            f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
        )
        marker = f" (validation: {curve.marker[1]})" if curve.run.metrics.all_evaluations else ""
        items.append(Markup(line + element("span", breakable(curve.run.name), marker)))
    return unordered(items, class_="legend")


def _key(report: Report, curves: Sequence[Curve]) -> Markup:
    """What the lines and marks are, of those that are there."""
    decays = {run.name: f"{run.smoothing:.2f} (about {1 / (1 - run.smoothing):.0f} updates)" for run in report.runs}
    same = len(set(decays.values())) == 1
    said = next(iter(decays.values())) if same else ", ".join(f"{name}: {text}" for name, text in decays.items())
    text = [
        f"Training loss: thin, each update; thick, a moving average with decay {said}, its start corrected for bias."
    ]
    if any(curve.run.metrics.all_evaluations for curve in curves):
        text.append("Validation loss: dashed with markers.")
    if any(curve.spikes for curve in curves):
        text.append("A cross marks a spike.")
    if any(curve.run.spec.training.max_grad_norm is not None for curve in curves):
        text.append("A dotted line is the norm that gradients are clipped to.")
    if any(len(curve.steps) > MOST_LINE_POINTS for curve in curves):
        text.append("Of long runs each stretch is drawn by its lowest and its highest update.")
    return element("p", " ".join(text), class_="quiet")


def _level(report: Report) -> Markup:
    values = "; ".join(f"{title.lower()} ({text})" for title, text in report.level.items())
    return element("p", f"Level throughout, so not drawn: {values}.", class_="quiet") if values else Markup()


def _charts(charts: Sequence[tuple[Chart, str]]) -> Markup:
    figures = (element("figure", element("figcaption", chart.title), Markup(svg)) for chart, svg in charts)
    return element("div", *figures, class_="charts")


def _differences(report: Report) -> Markup:
    if len(report.runs) > 1 and not report.spec_differences:
        return element("p", "None but the run directory.")
    return table(differences_table(report))


def _spec(run: RunReport) -> Markup:
    known = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    facts = [
        f"run directory: {run.path}",
        f"trained with {known}" if known else "no checkpoint records the versions that it was trained with",
        *(f"changed between two starts: {change}" for change in run.spec_changes),
        *(f"profiler trace: {name}" for name in run.traces),
    ]
    resolved = yaml.safe_dump(run.spec, sort_keys=False, allow_unicode=True)
    details = element("details", element("summary", "The resolved spec"), element("pre", resolved), class_="resolved")
    return Markup(element("h3", breakable(run.name)) + unordered(facts, class_="facts") + details)
