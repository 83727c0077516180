"""Early stopping: which evaluation is an improvement by more than ``min_delta``, and when patience ends the run."""

from __future__ import annotations


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
