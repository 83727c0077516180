"""Early stopping: an improvement by more than ``min_delta``, when patience ends the run, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamatune.events import EarlyStop


def count_evaluation(
    loss: float, reference: float | None, without_improvement: int, min_delta: float
) -> tuple[float, int]:
    """The next reference loss, and the number of evaluations in a row without an improvement.

    The reference is the last loss that was lower by more than ``min_delta``, not the lowest one: small gains that add
    up to more than ``min_delta`` are progress.
    """
    if reference is None or loss < reference - min_delta:
        return loss, 0
    return reference, without_improvement + 1


def out_of_patience(without_improvement: int, patience: int | None) -> bool:
    """Whether ``patience`` evaluations in a row were no improvement."""
    return patience is not None and without_improvement >= patience


def describe_stop(stop: EarlyStop, min_delta: float, total_steps: int) -> str:
    """Which evaluation ended the run, where the loss was lowest, and what to change to go on."""
    count, least = stop.evaluations_without_improvement, f" by more than {min_delta:g}" if min_delta else ""
    last = "" if stop.loss is None else f", the last with {stop.loss:.4f}"
    why = f"no lower validation loss in {count} evaluation{'s' * (count != 1)}{least}{last}"
    lowest = f"the lowest was {stop.best_eval_loss:.4f} at step {stop.best_step:,}, which is in best/"
    how = f"set evaluation.early_stopping_patience above {count}, or to null, and run the same command again to go on"
    return f"stopped early after step {stop.step:,} of {total_steps:,}: {why}; {lowest}; {how}"


def told_stop(summary: Mapping[str, Any]) -> str:
    """What the summary of a run says of an early stop; nothing without one, or of an earlier version."""
    stop = summary.get("early_stop")
    return "" if stop is None else str(stop["message"])
