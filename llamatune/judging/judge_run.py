"""The judgement of a run: base and tuned model on the same rows; gain, forgetting, overlap, rank and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from llamatune.command_options.judge import JudgeOptions, Requirement, file_name
from llamatune.data.choice_rows import read_choices
from llamatune.data.model_compatibility import check_rows, check_tokenizer
from llamatune.errors import DataError, SpecError
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.evaluate import PreparedReport, smaller_batches
from llamatune.inference.gsm8k import gsm8k_report, read_questions
from llamatune.inference.significance import exact_mcnemar, paired_difference_interval, score_interval
from llamatune.judging.figures import Figure, figures_of, metrics_of
from llamatune.judging.general_texts import PACKAGED, PACKAGED_NAME, make_texts
from llamatune.judging.measures import BOTH, Answers, Choices, Measure, RowLosses, compute_all
from llamatune.judging.opened_run import open_sides, open_task_rows
from llamatune.judging.overlap import JudgedRows, find_overlaps, prepared_rows
from llamatune.judging.rank_used import RankUse, rank_use
from llamatune.reporting.run_reader import Run, read_run

_COSTS = (
    "runtime_s", "energy_j", "mean_power_w", "peak_memory_bytes", "peak_device_memory_bytes", "trainable_parameters",
    "total_parameters", "steps",
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """The result. ``payload`` is what ``--json`` prints, ``question_lines`` what ``--per-question`` writes.

    ``failed`` are the requirements that do not hold, with what was measured.
    """

    payload: dict[str, Any]
    figures: list[Figure]
    rank: RankUse | None
    question_lines: list[dict[str, Any]]
    failed: list[tuple[Requirement, float]]


def judge_run(
    options: JudgeOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Judgement:
    """Measure what tuning gained and what it cost.

    Raises:
        SpecError: the run did not begin with the model on the disk, or a plot is asked for of weights without one.
        DataError: rows or texts that cannot be used. CheckpointError: no run, or weights that cannot be used.
        NumericsError: a loss is not finite. Stopped: ``should_stop`` said so.
    """
    files = [(file_name(path), read_choices(path, on_event)) for path in options.choices]
    questions = [] if options.gsm8k is None else read_questions(options.gsm8k, on_event)[: options.limit]
    run = read_run(options.run, options.run.name)
    sides = open_sides(run, options, on_event)
    rank = None if sides.tuned.adapter is None else rank_use(sides.tuned.adapter)
    if options.plot is not None and rank is None:
        what = "the run trained no low-rank update, so there is no rank to draw"
        raise SpecError(what, "--plot", "leave it out; extract-lora --plot draws what a model trained whole gained")
    task = open_task_rows(run, options.data, on_event)
    tuned, tokenizer = sides.tuned, sides.tuned.tokenizer()
    for config in chain.from_iterable(each.configs for each in sides.opened.values()):
        check_rows(task.rows, config, f"{task.data} against {tuned.path}", on_event)
    check_tokenizer(task.prepared, tuned.tokenizer_path, options.force_base, on_event)
    if task.train is None and any(required.metric == "overlap" for required in options.require or ()):
        raise DataError("overlap needs the run's training rows", options.run, "leave it out of --require")
    size, known = options.loss_rows, tuned.config.max_position_embeddings
    losses = RowLosses.of_split("task", task.rows, size, options.limit)
    named = [(PACKAGED_NAME, PACKAGED), *((file_name(path), path) for path in options.general)]
    texts = [make_texts(name, path, tokenizer, known, options.limit) for name, path in named]
    of_texts = [RowLosses.of_texts(each, size) for each in texts]
    choices = [Choices.of(name, file, tokenizer, known, options, on_event) for name, file in files]
    answers = Answers.of(questions, tuned, tokenizer, options, on_event) if questions else None
    measures: list[Measure] = [losses, *of_texts, *choices, *([] if answers is None else [answers])]
    tokens = size * sum(task.rows.lengths) / len(task.rows)
    advice = "".join(smaller_batches(size))
    compute_all(sides.opened, measures, tokens, advice, on_event, should_stop)
    judged = [
        prepared_rows("task", task.rows, tokenizer, options.limit),
        *(JudgedRows(each.name, each.documents) for each in texts),
        *(JudgedRows(each.name, [asked.question.text for asked in each.encoded]) for each in choices),
        *([JudgedRows("gsm8k", [f"{q.text}\n{q.worked}" for q in questions])] if questions else []),
    ]
    overlaps = None if task.train is None else find_overlaps(judged, task.train, tokenizer, on_event, should_stop)
    rows = losses.scores[""]
    told = PreparedReport(task.data, task.split, tuned.dtype_name, [task.split] * len(rows), _ordered(losses.scores))
    payload: dict[str, Any] = {
        "run": str(options.run),
        "weights": str(sides.weights),
        "model": str(options.model or run.spec.model.path),
        "dtype": tuned.dtype_name,
        "task": told.to_dict(),
        "texts": [_text_result(each, losses) for each, losses in zip(texts, of_texts, strict=True)],
        "choices": [_choice_result(each) for each in choices],
        "gsm8k": None if answers is None else _gsm8k_result(str(options.gsm8k), tuned.dtype_name, answers),
        "overlap": None if overlaps is None else [asdict(overlap) for overlap in overlaps],
        "rank": None if rank is None else asdict(rank),
        "cost": _cost(run),
    }
    figures = figures_of(payload)
    payload["table"] = [asdict(figure) for figure in figures]
    payload["metrics"] = metrics_of(figures, None if overlaps is None else overlaps[0].share)
    measured = [(each, payload["metrics"][each.metric]) for each in options.require or ()]
    payload["requirements"] = [
        {"requirement": str(each), "value": value, "holds": each.holds(value)} for each, value in measured
    ]
    failed = [(each, value) for each, value in measured if not each.holds(value)]
    return Judgement(payload, figures, rank, [line for each in choices for line in each.lines()], failed)


def _ordered(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix: scores[prefix] for prefix in ("", "base_")}


def _text_result(texts: Any, losses: RowLosses) -> dict[str, Any]:
    scores = _ordered(losses.scores)
    told = PreparedReport(texts.path, "text", "", [], scores).to_dict()
    path = "the text in the package" if texts.name == PACKAGED_NAME else texts.path
    kept = ("rows", "tokens", "target_tokens", "loss", "perplexity", "base_loss", "base_perplexity")
    return {
        "name": texts.name,
        "data": path,
        **{key: told[key] for key in kept},
        "forgetting": told["loss_difference"],
        "forgetting_interval": told["loss_difference_interval"],
    }


def _gsm8k_result(data: str, dtype: str, answers: Answers) -> dict[str, Any]:
    lines = answers.lines()
    told = gsm8k_report(data, dtype, 0, lines)
    interval = paired_difference_interval(told["gained"], told["lost"], len(lines))
    return told | {"accuracy_difference_interval": interval}


def _choice_result(choices: Choices) -> dict[str, Any]:
    count = len(choices.encoded)
    values: dict[str, Any] = {
        "name": choices.name,
        "data": str(choices.file.path),
        "shape": choices.file.shape,
        "questions": count,
    }
    for rule in ("acc", "acc_norm"):
        right = {prefix: [getattr(score, rule) for score in choices.scores[prefix]] for prefix in BOTH}
        for prefix, found in right.items():
            values[f"{prefix}{rule}"] = sum(found) / count
            values[f"{prefix}{rule}_interval"] = score_interval(sum(found), count)
        pairs = list(zip(right[""], right["base_"], strict=True))
        gained, lost = (sum(new > old for new, old in pairs), sum(new < old for new, old in pairs))
        values |= {
            f"{rule}_change": (gained - lost) / count,
            f"{rule}_change_interval": paired_difference_interval(gained, lost, count),
            f"{rule}_gained": gained,
            f"{rule}_lost": lost,
            f"{rule}_p_value": exact_mcnemar(gained, lost),
        }
    return values


def _cost(run: Run) -> dict[str, Any]:
    """Of the training, by ``summary.json``; null where the run did not measure it, or has not ended."""
    return {key: run.summary.get(key) for key in _COSTS}


def failure(failed: Sequence[tuple[Requirement, float]]) -> str:
    """The requirements that do not hold, with what was measured."""
    told = [
        f"{required.metric} is {value:.6g}, not {required.relation} {required.bound:g}" for required, value in failed
    ]
    return "; ".join(told)
