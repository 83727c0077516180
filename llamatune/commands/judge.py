"""``llamatune judge``: what the tuning of a run gained and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llamatune.command_options.judge import JudgeOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import RequirementFailed, printable

if TYPE_CHECKING:
    from llamatune.judging.judge_run import Judgement

_MOST_BARS = 8
_FORMATS: dict[str, tuple[Callable[[float], str], Callable[[float], str]]] = {
    "loss": ("{:.4f}".format, "{:+.4f}".format),
    "perplexity": ("{:.2f}".format, "{:+.2f}".format),
    "share": ("{:.1%}".format, "{:+.1%}".format),
}
"""Of a figure and of its change."""
_BARS = "▁▂▃▄▅▆▇█"


def judge(options: JudgeOptions, console: Console) -> None:
    """Measure what tuning gained, what it made worse, and what it cost."""
    with console:
        from llamatune.judging.judge_run import failure, judge_run
        from llamatune.output_files import write_output
        from llamatune.strict_json import dump_json_lines

        if options.plot is not None:
            from llamatune.reporting.chart_images import require_matplotlib

            require_matplotlib()
        judgement = judge_run(options, console.on_event, console.should_stop)
        if options.plot is not None:
            from llamatune.judging.rank_charts import rank_png

            assert judgement.rank is not None, "else the plot was refused"
            write_output(options.plot, rank_png(judgement.rank), options.overwrite)
        if options.per_question is not None:
            write_output(options.per_question, dump_json_lines(judgement.question_lines), options.overwrite)
        console.result(
            judgement.payload,
            lambda out: _print_table(out, judgement) if out.is_terminal else _print_lines(out, judgement),
        )
    if judgement.failed:
        raise RequirementFailed(f"--require does not hold: {failure(judgement.failed)}", options.run)


def _print_lines(out: RichConsole, judgement: Judgement) -> None:
    """A line for each figure, its name and ``key=value``; then the sentences as on a terminal."""
    for figure in judgement.figures:
        low, high = figure.interval or (None, None)
        values = {"rows": figure.rows, "base": figure.base, "tuned": figure.tuned, "change": figure.change}
        values |= {
            key: value for key, value in (("low", low), ("high", high), ("p", figure.p_value)) if value is not None
        }
        out.print(f"{printable(figure.metric)} {' '.join(f'{key}={value:.6g}' for key, value in values.items())}")
    for sentence in _sentences(judgement):
        out.print(printable(sentence))


def _print_table(out: RichConsole, judgement: Judgement) -> None:
    from rich.table import Column, Table

    payload = judgement.payload
    right = [Column(name, justify="right") for name in ("base", "tuned", "change", "95 % interval")]
    title = f"{printable(payload['weights'])} on {printable(payload['model'])}, {payload['dtype']}"
    table = Table("", *right, title=title, title_justify="left")
    for figure in judgement.figures:
        plain, signed = _FORMATS[figure.kind]
        sure = "" if figure.interval is None else " to ".join(map(signed, figure.interval))
        label = f"{figure.what}, {figure.rows:,}: {figure.metric.rpartition('.')[2]}"
        table.add_row(printable(label), plain(figure.base), plain(figure.tuned), signed(figure.change), sure)
    out.print(table)
    for sentence in _sentences(judgement):
        out.print(printable(sentence))


def _sentences(judgement: Judgement) -> Iterator[str]:
    from llamatune.units import duration, energy, gibibytes

    payload = judgement.payload
    for figure in judgement.figures:
        if figure.interval is not None and (figure.change_metric or "").endswith("forgetting"):
            low, high = figure.interval
            way = "harder" if figure.change > 0 else "easier"
            change = f"{figure.what} became {way}, by {abs(figure.change):.4f} nats a token"
            yield change if low > 0 or high < 0 else f"no change of {figure.what} that differs from chance"
    for overlap in payload["overlap"] or ():
        found = [f"{overlap['ngram_rows']:,} share 13 words in a row with a training row"]
        if overlap["equal_rows"] is not None:
            equal = f"{overlap['equal_rows']:,} are training rows, {overlap['equal_prompts']:,} have the prompt of one"
            found = [equal, *found]
        if overlap["short_rows"]:
            found.append(f"{overlap['short_rows']:,} are too short to tell")
        yield f"overlap of {overlap['name']}, {overlap['rows']:,} rows: {', '.join(found)}"
    if judgement.rank is not None:
        from llamatune.judging.rank_charts import by_module

        for module, layers in by_module(judgement.rank).items():
            used = [layer.effective_rank for layer in layers]
            most = max(layer.r for layer in layers)
            bars = "".join(_BARS[min(_MOST_BARS - 1, int(value / most * _MOST_BARS))] for value in used)
            yield f"rank used, {module}: {sum(used) / len(used):.2f} of {most} {bars}"
    cost = payload["cost"]
    told = [
        "" if cost["runtime_s"] is None else duration(cost["runtime_s"]),
        "" if cost["energy_j"] is None else energy(cost["energy_j"]),
        "" if cost["peak_memory_bytes"] is None else gibibytes(cost["peak_memory_bytes"]),
        "" if cost["trainable_parameters"] is None else f"{cost['trainable_parameters']:,} trained parameters",
    ]
    if any(told):
        yield f"training took {', '.join(filter(None, told))}"
    for each in payload["requirements"]:
        yield f"{each['requirement']}: {'holds' if each['holds'] else 'does not hold'} ({each['value']:.6g})"
