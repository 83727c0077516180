"""The HTML of the report's page: one file without scripts or links, all texts from files escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from string import Template

import yaml

from llamatune import __version__
from llamatune.reporting.answer_timeline import AnswerTimeline
from llamatune.reporting.chart_images import PALETTE, Chart
from llamatune.reporting.curves import Curve
from llamatune.reporting.html_answers import answers_html
from llamatune.reporting.html_elements import Markup, element, header, html, section, table, unordered
from llamatune.reporting.report_data import Report, RunReport
from llamatune.reporting.report_tables import (
    data_table,
    differences_table,
    epochs_table,
    figures_table,
    memory_table,
    parameters_table,
    ranks_table,
    settings_table,
    spikes_table,
)
from llamatune.reporting.report_text import findings, whole

_PAGE = {"page": ("#ffffff", "#0d1117"), "panel": ("#f3f5f7", "#161b22"), "quiet": ("#57606a", "#9aa4af")}


def render_page(report: Report, charts: Sequence[tuple[Chart, str]], curves: Sequence[Curve]) -> str:
    """The whole page; ``charts`` are given with their SVG."""
    body = (
        _overview(report),
        section("Diagnosis", *(_diagnosis(run) for run in report.runs)),
        section("Curves", _legend(curves), _key(report), _charts(charts), _level(report), class_="curves"),
        section("Epochs", *(table(epochs_table(run)) for run in report.runs)),
        section("Evaluation and benchmark", *map(table, report.evidence)),
        section("Before and after", *map(answers_html, report.samples)),
        section("Answers while it trained", *(_timeline(run, found) for run in report.runs for found in run.answers)),
        section("Differences between the specs", _differences(report)),
        section(
            "Parameters and memory",
            *(table(make(run)) for run in report.runs for make in (parameters_table, memory_table, ranks_table)),
        ),
        section("Data", *(table(data_table(run)) for run in report.runs)),
        section("Specs and versions", *map(_spec, report.runs)),
        element("p", f"Made by llamatune {__version__}.", class_="quiet"),
    )
    return Template(_file("page.html")).substitute(
        title=html("Training report: " + ", ".join(run.name for run in report.runs)),
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
    notices = unordered((f"{run.name}: {notice}" for run in report.runs for notice in run.notices), class_="quiet")
    return element("section", table(settings_table(report)), table(figures_table(report)), notices, class_="overview")


def _diagnosis(run: RunReport) -> Markup:
    said = unordered(findings(run.diagnosis), class_="findings")
    return Markup(element("h3", run.name) + said + table(spikes_table(run)))


def _legend(curves: Sequence[Curve]) -> Markup:
    """Each run's name beside a line in its colour, with the name of its validation marker."""
    items = []
    for curve in curves:
        dashes = " ".join(str(3 * length) for length in curve.dashes)
        line = (
            f'<svg viewBox="0 0 44 12" aria-hidden="true"><path d="M0 6H44" stroke="var(--{curve.series})" '
            f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
        )
        items.append(Markup(line + element("span", f"{curve.run.name} (validation: {curve.marker[1]})")))
    return unordered(items, class_="legend")


def _key(report: Report) -> Markup:
    decays = {run.name: f"{run.smoothing:.2f} (about {1 / (1 - run.smoothing):.0f} updates)" for run in report.runs}
    same = len(set(decays.values())) == 1
    said = next(iter(decays.values())) if same else ", ".join(f"{name}: {text}" for name, text in decays.items())
    text = (
        f"Training loss: thin, each update; thick, a moving average with decay {said}, its start corrected for bias. "
        "Validation loss: dashed with markers. "
        "A cross marks a spike, a dotted line the norm that gradients are clipped to. "
        "Of long runs each stretch is drawn by its lowest and its highest update."
    )
    return element("p", text, class_="quiet")


def _level(report: Report) -> Markup:
    values = "; ".join(f"{title.lower()} ({text})" for title, text in report.level.items())
    return element("p", f"Level throughout, so not drawn: {values}.", class_="quiet") if values else Markup()


def _charts(charts: Sequence[tuple[Chart, str]]) -> Markup:
    figures = (element("figure", element("figcaption", chart.title), Markup(svg)) for chart, svg in charts)
    return element("div", *figures, class_="charts")


def _timeline(run: RunReport, found: AnswerTimeline) -> Markup:
    """One prompt; its answers by step, and the answer of its row."""
    texts = [("before training" if step == 0 else f"step {whole(step)}", text) for step, text in found.answers]
    if found.left_out:
        texts.insert(-1, ("", f"{found.left_out} answers between these are in metrics.jsonl"))
    if found.reference is not None:
        texts.append(("reference", found.reference))
    rows = [
        element("tr", element("td", step, data_label="after"), element("td", text, data_label="answer"))
        for step, text in texts
    ]
    caption = element("caption", f"{run.name}: ", element("span", found.prompt, class_="prompt"))
    return element("table", caption, header(("after", "answer")), element("tbody", *rows), class_="answers timeline")


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
    return Markup(element("h3", run.name) + unordered(facts) + details)
