"""The figures of a judgement: one of base and tuned model each, with the change and its interval, in one list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """A figure of base and tuned model; ``interval`` is that of the change, 95 %, ``p_value`` McNemar's exact test's.

    ``metric`` and ``change_metric`` are what ``--require`` calls the tuned model's figure and the change; ``rows`` what
    it was measured on.
    """

    metric: str
    change_metric: str | None
    kind: Literal["loss", "perplexity", "share"]
    what: str
    rows: int
    base: float
    tuned: float
    change: float
    interval: tuple[float, float] | None = None
    p_value: float | None = None


def figures_of(payload: Mapping[str, Any]) -> list[Figure]:
    """From the parts of the result, in the order of the table."""
    return list(_figures(payload))


def metrics_of(figures: list[Figure], overlap: float | None) -> dict[str, float]:
    """Each value that can be required, by its name; ``overlap`` None: it was not measured."""
    found: dict[str, float] = {}
    for figure in figures:
        found[figure.metric] = figure.tuned
        if figure.change_metric is not None:
            found[figure.change_metric] = figure.change
    return found if overlap is None else found | {"overlap": overlap}


def _figures(payload: Mapping[str, Any]) -> Iterator[Figure]:
    task, (general, *own) = payload["task"], payload["texts"]
    yield _loss("task_loss", "task_loss_change", f"task, {task['split']} rows", task, "loss_difference")
    base, tuned = task["base_perplexity"], task["perplexity"]
    yield Figure("task_perplexity", None, "perplexity", "task", task["rows"], base, tuned, tuned - base)
    if (found := payload["gsm8k"]) is not None:
        yield Figure(
            "gsm8k_accuracy", "gsm8k_change", "share", "GSM8K, exact match", found["questions"], found["base_accuracy"],
            found["accuracy"], found["accuracy_difference"], found["accuracy_difference_interval"], found["p_value"],
        )  # fmt: skip
    yield _loss("general_loss", "forgetting", "general text", general, "forgetting")
    for text in own:
        name = text["name"]
        yield _loss(f"{name}.loss", f"{name}.forgetting", f"text {name}", text, "forgetting")
    for found in payload["choices"]:
        for rule in ("acc", "acc_norm"):
            name, change = f"{found['name']}.{rule}", f"{rule}_change"
            yield Figure(
                name, f"{name}_change", "share", f"{found['name']} ({found['shape']})", found["questions"],
                found[f"base_{rule}"], found[rule], found[change], found[f"{change}_interval"],
                found[f"{rule}_p_value"],
            )  # fmt: skip


def _loss(metric: str, change_metric: str, what: str, values: Mapping[str, Any], change: str) -> Figure:
    figures = values["rows"], values["base_loss"], values["loss"], values[change]
    return Figure(metric, change_metric, "loss", what, *figures, values[f"{change}_interval"])
