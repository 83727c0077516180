"""The HTML of the report's page: one file without scripts or links, all texts from files escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

import yaml

from llamatune import __version__
from llamatune.errors import printable
from llamatune.reporting.answer_timeline import AnswerTimeline
from llamatune.reporting.chart_images import PALETTE, Chart
from llamatune.reporting.charts import Curve
from llamatune.reporting.report_data import Report, RunReport
from llamatune.reporting.report_text import ABSENT, figure_rows, findings, loss, optional, two_places, whole
from llamatune.reporting.sample_answers import Samples
from llamatune.reporting.spikes import Spike
from llamatune.units import duration, gibibytes

_PAGE = {"page": ("#ffffff", "#0d1117"), "panel": ("#f3f5f7", "#161b22"), "quiet": ("#57606a", "#9aa4af")}
_MOST_ROWS_NAMED = 24


class Markup(str):
    """HTML made here. Any other string is escaped when it is put into the page."""


def _html(value: object) -> Markup:
    """``value`` as HTML: text escaped, line breaks and tabs kept, other control characters shown as escapes."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(printable(str(value), keeps="\n\t")))


def _element(tag: str, *content: object, **attributes: str) -> Markup:
    names = "".join(f' {name.strip("_").replace("_", "-")}="{escape(x)}"' for name, x in attributes.items())
    return Markup(f"<{tag}{names}>{''.join(map(_html, content))}</{tag}>")


def _list(items: Iterable[object], **attributes: str) -> Markup:
    """An unordered list; nothing without items."""
    entries = [_element("li", item) for item in items]
    return _element("ul", *entries, **attributes) if entries else Markup()


def _header(headings: Sequence[str]) -> Markup:
    return _element("thead", _element("tr", *(_element("th", heading, scope="col") for heading in headings)))


def _table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table of numbers; rows begin with their heading. It scrolls sideways on a narrow screen."""
    body = [
        _element("tr", _element("th", first, scope="row"), *(_element("td", x) for x in rest)) for first, *rest in rows
    ]
    if not body:
        return Markup()
    parts = _element("caption", caption), _header(headings), _element("tbody", *body)
    return _element("div", _element("table", *parts, class_="numbers"), class_="scroll", tabindex="0")


def _section(title: str, *content: Markup) -> Markup:
    """A section with a heading; nothing without content."""
    filled = [part for part in content if part]
    return _element("section", _element("h2", title), *filled) if filled else Markup()


def render_page(report: Report, charts: Sequence[tuple[Chart, str]], curves: Sequence[Curve]) -> str:
    """The whole page; ``charts`` are given with their SVG."""
    names = [run.name for run in report.runs]
    body = (
        _overview(report),
        _section("Diagnosis", *(_diagnosis(run) for run in report.runs)),
        _section("Curves", _legend(curves), _key(report), _charts(charts)),
        _section("Epochs", *(_epochs(run) for run in report.runs)),
        _section("Before and after", *map(_answers, report.samples)),
        _section("Answers while it trained", *(_timeline(run, found) for run in report.runs for found in run.answers)),
        _section("Differences between the specs", _differences(report, names)),
        _section(
            "Parameters and memory", *(part(run) for run in report.runs for part in (_parameters, _memory, _ranks))
        ),
        _section("Data", *map(_data, report.runs)),
        _section("Specs and versions", *map(_spec, report.runs)),
        _element("p", f"Made by llamatune {__version__}.", class_="quiet"),
    )
    return Template(_file("page.html")).substitute(
        title=_html("Training report: " + ", ".join(names)),
        style=_colours() + _file("page.css"),
        body="\n".join(part for part in body if part),
    )


def _file(name: str) -> str:
    return resources.files("llamatune.reporting").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Every colour as a CSS variable, for light and dark pages."""
    colours = {**PALETTE, **_PAGE}.items()
    light, dark = (" ".join(f"--{name}: {pair[scheme]};" for name, pair in colours) for scheme in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _overview(report: Report) -> Markup:
    runs = report.runs
    rows = [("status", *(run.status for run in runs))]
    rows += [(label, *values) for label, values in figure_rows([run.figures for run in runs])]
    figures = _table("Final figures", ["", *(run.name for run in runs)], rows)
    notices = _list((f"{run.name}: {notice}" for run in runs for notice in run.notices), class_="quiet")
    return _element("section", figures, notices)


def _diagnosis(run: RunReport) -> Markup:
    headings = (
        "peak at step", "epoch", "loss", "usual before", "gradient norm before clipping", "usual before",
        "learning rate", "steps", "rows of the window",
    )  # fmt: skip
    spikes = _table("Spikes", headings, map(_spike, run.diagnosis.spikes))
    return Markup(_element("h3", run.name) + _list(findings(run.diagnosis)) + spikes)


def _spike(spike: Spike) -> Sequence[object]:
    rows = "the prepared data is needed to name them"
    if spike.rows is not None:
        more = len(spike.rows) - _MOST_ROWS_NAMED
        rows = ", ".join(map(str, spike.rows[:_MOST_ROWS_NAMED])) + (f" and {more} more" if more > 0 else "")
    losses = (loss(spike.loss), loss(spike.typical_loss))
    norms = (f"{norm:.3g}" for norm in (spike.grad_norm, spike.typical_grad_norm))
    steps = f"{spike.first_step:,} to {spike.last_step:,}" + ("" if spike.recovered else ", not over")
    return whole(spike.step), spike.epoch, *losses, *norms, f"{spike.learning_rate:.3g}", steps, rows


def _legend(curves: Sequence[Curve]) -> Markup:
    """Each run's name beside a line in its colour, with the name of its validation marker."""
    items = []
    for curve in curves:
        dashes = " ".join(str(3 * length) for length in curve.dashes)
        line = (
            f'<svg viewBox="0 0 44 12" aria-hidden="true"><path d="M0 6H44" stroke="var(--{curve.series})" '
            f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
        )
        items.append(Markup(line + _element("span", f"{curve.run.name} (validation: {curve.marker[1]})")))
    return _list(items, class_="legend")


def _key(report: Report) -> Markup:
    memory = f"decay {report.smoothing:g} (about {1 / (1 - report.smoothing):.0f} updates)"
    text = (
        f"Training loss: thin, each update; thick, a moving average with {memory}, its start corrected for bias. "
        "Validation loss: dashed with markers. "
        "A cross marks a spike, a dotted line the norm that gradients are clipped to. "
        "Of long runs each stretch is drawn by its lowest and its highest update."
    )
    return _element("p", text, class_="quiet")


def _charts(charts: Sequence[tuple[Chart, str]]) -> Markup:
    figures = (_element("figure", _element("figcaption", chart.title), Markup(svg)) for chart, svg in charts)
    return _element("div", *figures, class_="charts")


def _epochs(run: RunReport) -> Markup:
    headings = (
        "epoch", "updates", "training loss", "perplexity", "validation loss", "perplexity", "target tokens", "ended at",
    )  # fmt: skip
    rows = []
    for epoch in run.epochs:
        name = f"{epoch.epoch}" + ("" if epoch.complete else " (part)")
        training = (loss(epoch.train_loss), two_places(epoch.train_perplexity))
        validation = (optional(epoch.validation_loss, loss), optional(epoch.validation_perplexity, two_places))
        ended = (whole(epoch.target_tokens), duration(epoch.elapsed_s))
        rows.append((name, whole(epoch.steps), *training, *validation, *ended))
    return _table(run.name, headings, rows)


def _answers(answers: Samples) -> Markup:
    headings = ("prompt", "before", "after")
    rows = []
    for sample in answers.samples:
        texts = (sample.prompt, ABSENT if sample.base is None else sample.base, sample.tuned)
        cells = (_element("td", text, data_label=label) for label, text in zip(headings, texts, strict=True))
        rows.append(_element("tr", *cells))
    parts = _element("caption", answers.source), _header(headings), _element("tbody", *rows)
    return _element("table", *parts, class_="answers")


def _timeline(run: RunReport, found: AnswerTimeline) -> Markup:
    """One prompt; its answers by step, and the answer of its row."""
    texts = [("before training" if step == 0 else f"step {whole(step)}", text) for step, text in found.answers]
    if found.left_out:
        texts.insert(-1, ("", f"{found.left_out} answers between these are in metrics.jsonl"))
    if found.reference is not None:
        texts.append(("reference", found.reference))
    rows = [
        _element("tr", _element("td", step, data_label="after"), _element("td", text, data_label="answer"))
        for step, text in texts
    ]
    caption = _element("caption", f"{run.name}: ", _element("span", found.prompt, class_="prompt"))
    return _element("table", caption, _header(("after", "answer")), _element("tbody", *rows), class_="answers timeline")


def _differences(report: Report, names: Sequence[str]) -> Markup:
    rows = [(field, *(_value(row[name]) for name in names)) for field, row in report.spec_differences.items()]
    if len(names) > 1 and not rows:
        return _element("p", "None but the run directory.")
    return _table("Fields that are not the same in all runs", ["field", *names], rows)


def _value(value: object) -> str:
    return ABSENT if value is None else str(yaml.safe_dump(value, default_flow_style=True, width=1000)).splitlines()[0]


def _parameters(run: RunReport) -> Markup:
    counts = [(name, facts["base"], facts["adapter"]) for name, facts in run.parameters.items()]
    if counts:
        counts.append(("all", sum(base for _, base, _ in counts), sum(adapter for *_, adapter in counts)))
    rows = [(name, whole(base), whole(adapter) if adapter else "") for name, base, adapter in counts]
    return _table(f"{run.name}: parameters, all blocks together", ("module", "base", "adapter"), rows)


def _memory(run: RunReport) -> Markup:
    rows = [(key.removesuffix("_bytes").replace("_", " "), gibibytes(x), whole(x)) for key, x in run.memory.items()]
    return _table(f"{run.name}: memory", ("", "size", "bytes"), rows)


def _ranks(run: RunReport) -> Markup:
    forms = {"peak_memory_bytes": gibibytes, "tokens_per_second": whole, "wait_share": "{:.1%}".format}
    rows = [
        (number, *(optional(rank.get(key), form) for key, form in forms.items()))
        for number, rank in enumerate(run.ranks)
    ]
    return _table(f"{run.name}: ranks", ("rank", "peak memory", "tokens/s of its own", "time in messages"), rows)


def _data(run: RunReport) -> Markup:
    rows = [(key.replace("_", " "), whole(x) if isinstance(x, int) else x) for key, x in run.data.items()]
    return _table(f"{run.name}: {run.spec['data']['train']}", ("", "count"), rows)


def _spec(run: RunReport) -> Markup:
    known = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    facts = [
        f"run directory: {run.path}",
        f"trained with {known}" if known else "no checkpoint records the versions that it was trained with",
        *(f"changed between two starts: {change}" for change in run.spec_changes),
        *(f"profiler trace: {name}" for name in run.traces),
    ]
    resolved = yaml.safe_dump(run.spec, sort_keys=False, allow_unicode=True)
    details = _element("details", _element("summary", "The resolved spec"), _element("pre", resolved))
    return Markup(_element("h3", run.name) + _list(facts) + details)
