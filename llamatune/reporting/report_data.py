"""The data of a report: figures, epochs, findings and facts of each run, and what the specs differ in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llamatune.checkpoints.model_directory import read_config
from llamatune.errors import LlamatuneError, printable
from llamatune.formats.file_schema import LARGEST_NUMBER
from llamatune.formats.text_table import TextTable
from llamatune.reporting.answer_timeline import AnswerTimeline, answer_timelines
from llamatune.reporting.averages import Epoch, epoch_means
from llamatune.reporting.diagnosis import Diagnosis, diagnose_run
from llamatune.reporting.run_reader import Run
from llamatune.reporting.sample_answers import Samples, known_template
from llamatune.reporting.settings import settings_of
from llamatune.shapes.counts import ParameterCount, count_parameters
from llamatune.units import perplexity


@dataclass(frozen=True)
class RunReport:
    """The report on one run. A figure is None if the run does not have it (yet); sizes are in bytes.

    ``settings`` are in words. ``smoothing`` is the decay of the running average. ``ranks`` has one object of figures a
    rank, and none for a run of one process.
    """

    name: str
    path: str
    status: str
    notices: list[str]
    settings: dict[str, str]
    smoothing: float
    figures: dict[str, float | None]
    diagnosis: Diagnosis
    epochs: list[Epoch]
    evaluations: list[dict[str, float]]
    parameters: dict[str, dict[str, int]]
    memory: dict[str, float]
    ranks: list[dict[str, float]]
    data: dict[str, int | str]
    spec: dict[str, Any]
    spec_changes: list[str]
    versions: dict[str, str]
    traces: list[str]
    answers: list[AnswerTimeline]


@dataclass(frozen=True)
class Report:
    """Several runs and their differences: ``spec_differences`` holds each field's value by run.

    ``smoothing`` None: by the length of each run. ``level`` has values that are in no chart, being level.
    ``evidence`` are tables of evaluations and benchmarks.
    """

    output: str
    png: str | None
    charts: str | None
    tables: str | None
    smoothing: float | None
    runs: list[RunReport]
    spec_differences: dict[str, dict[str, Any]]
    samples: list[Samples]
    level: dict[str, str]
    evidence: list[TextTable]


def report_run(run: Run, smoothed: Sequence[float], smoothing: float, notices: Sequence[str] = ()) -> RunReport:
    """The report on one run; ``smoothed`` is the running average of its losses, of the decay ``smoothing``."""
    steps, evaluations = run.metrics.steps, run.metrics.evaluations
    count, count_notice = _count(run)
    epochs = epoch_means(steps, {evaluation.step: evaluation.loss for evaluation in evaluations})
    figures = _figures(run, epochs, smoothed, count)
    return RunReport(
        name=run.name,
        path=printable(str(run.path)),
        status=run.status,
        notices=[*run.notices, *([count_notice] if count_notice else []), *notices],
        settings=settings_of(run, figures["trainable_parameters"], figures["total_parameters"]),
        smoothing=smoothing,
        figures=figures,
        diagnosis=diagnose_run(run),
        epochs=epochs,
        evaluations=[
            {"step": e.step, "loss": e.loss, "perplexity": perplexity(e.loss)} for e in run.metrics.all_evaluations
        ],
        parameters={} if count is None else {name: dict(facts) for name, facts in count.modules.items()},
        memory=_memory(run),
        ranks=[dict(_numbers(rank)) for rank in _ranks(run)],
        data=run.data,
        spec=run.spec.model_dump(mode="json"),
        spec_changes=run.spec_changes,
        versions=run.versions,
        traces=run.traces,
        answers=answer_timelines(run.metrics.answers, list(filter(None, [known_template(run)]))),
    )


def _count(run: Run) -> tuple[ParameterCount | None, str]:
    """Parameters by module, from the base's configuration, or a notice why they are not known."""
    spec = run.found
    try:
        config = read_config(Path(spec.model.path), variant=spec.model.variant).with_layers(spec.model.num_layers)
        count = count_parameters(config, spec.adapter)
    except (LlamatuneError, ValueError) as fault:  # a null byte in the path
        return None, f"no parameters by module: {fault}"
    if (run.summary or {"total_parameters": count.total_parameters})["total_parameters"] != count.total_parameters:
        return None, f"no parameters by module: {spec.model.path} is another model than the run's"
    return count, ""


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested objects, named by its keys joined with underscores."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}_")
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER:
            yield prefix + key, value


def _figures(
    run: Run, epochs: Sequence[Epoch], smoothed: Sequence[float], count: ParameterCount | None
) -> dict[str, float | None]:
    """The final figures. Most come from the log, so that unfinished runs can be compared too."""
    steps, evaluations = run.metrics.steps, run.metrics.evaluations
    summary = dict(_numbers(run.summary))
    at_start, best = run.metrics.at_start, min(evaluations, key=lambda evaluation: evaluation.loss, default=None)
    last = evaluations[-1].loss if evaluations else None
    trainable = count.trainable_parameters if count else summary.get("trainable_parameters")
    total = count.total_parameters if count else summary.get("total_parameters")
    return {
        "steps": len(steps),
        "epochs": steps[-1].epoch if steps else 0,
        "train_loss": epochs[-1].train_loss if epochs else None,
        "smoothed_train_loss": smoothed[-1] if smoothed else None,
        "start_validation_loss": at_start.loss if at_start else None,
        "best_validation_loss": best.loss if best else None,
        "best_validation_step": best.step if best else None,
        "last_validation_loss": last,
        "last_validation_perplexity": None if last is None else perplexity(last),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total if trainable and total else None,
        "peak_memory_bytes": summary.get("peak_memory_bytes", steps[-1].peak_memory_bytes if steps else None),
        **{key: summary.get(key) for key in ("peak_device_memory_bytes", "energy_j", "mean_power_w", "peak_power_w")},
        "runtime_s": summary.get("runtime_s", steps[-1].elapsed_s if steps else None),
        "tokens_per_second": summary.get("tokens_per_second"),
        "median_tokens_per_second": median(step.tokens_per_second for step in steps) if steps else None,
        "skipped_windows": len(run.metrics.skipped) if run.spec.training.precision == "fp16" else None,
        "ranks": len(_ranks(run)) or None,
    }


def _memory(run: Run) -> dict[str, float]:
    """All sizes that the run measured or predicted; the peak so far if the run is unfinished."""
    sizes = {key: value for key, value in _numbers(run.summary) if key.endswith("_bytes")}
    if not sizes and run.metrics.steps:
        sizes["peak_memory_bytes"] = run.metrics.steps[-1].peak_memory_bytes
    return sizes


def _ranks(run: Run) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = run.summary.get("ranks", [])
    return ranks


def spec_differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Fields whose values are not the same in all runs; None if a run's spec has no such section."""
    flat = {run.name: run.spec.flat() for run in runs}
    fields = list(dict.fromkeys(field for values in flat.values() for field in values))
    table = {field: {name: values.get(field) for name, values in flat.items()} for field in fields}
    del table["training.output_dir"]  # two runs never share one
    return {field: row for field, row in table.items() if any(value != row[runs[0].name] for value in row.values())}
