"""Ranks that share a window's work wrongly, each in one way; a warm run can be given one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llamatune.data.batches import Batch
from llamatune.ranks import Ranks
from llamatune.seeds import derived_seed
from llamatune.shapes.gradient_lanes import own_lanes
from llamatune.training import training_step, window_gradients
from llamatune.training.gradient_sum import TreeSum
from llamatune.training.model_and_optimizer import Learner

_RANK, _SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Window:
    """The window that is being computed: its passes, and the indices of those of this rank."""

    passes: Sequence[Batch] = ()
    own: Sequence[int] = ()


def _watch_windows() -> None:
    compute, deal = window_gradients.window_gradients, window_gradients.deal_passes

    def window(learner: Learner, passes: Sequence[Batch], *rest: Any) -> Any:
        _Window.passes = passes
        return compute(learner, passes, *rest)

    def deal_passes(tokens: Sequence[int], lanes: int) -> list[list[int]]:
        dealt = deal(tokens, lanes)
        _Window.own = [index for lane in own_lanes(_RANK, _SIZE, lanes) for index in dealt[lane]]
        return dealt

    training_step.window_gradients, window_gradients.deal_passes = window, deal_passes


def _divide_by(divisor: Callable[[Batch], float]) -> None:
    _watch_windows()
    backward = window_gradients._backward
    window_gradients._backward = lambda learner, batch, seed, right: backward(learner, batch, seed, divisor(batch))


def mean_per_rank() -> None:
    """The gradient is the ranks' mean of each rank's mean over its own target tokens."""
    _divide_by(lambda batch: float(_SIZE * sum(_Window.passes[index].target_tokens for index in _Window.own)))


def mean_per_micro_batch() -> None:
    """Each micro-batch counts the same, however many target tokens it has."""
    _divide_by(lambda batch: float(len(_Window.passes) * batch.target_tokens))


def dropout_by_local_index() -> None:
    """Dropout is drawn from the number of a pass among those of its rank."""
    _watch_windows()
    window_gradients.derived_seed = lambda seed, name, window, index: derived_seed(
        seed, name, window, _Window.own.index(index)
    )


def repeated_row() -> None:
    """A rank that has no pass repeats the first, as samplers do that make shares even."""
    deal = window_gradients.deal_passes

    def deal_passes(tokens: Sequence[int], lanes: int) -> list[list[int]]:
        dealt = deal(tokens, lanes)
        for rank in range(_SIZE):
            own = own_lanes(rank, _SIZE, lanes)
            if not any(dealt[lane] for lane in own):
                dealt[own[0]].append(0)
        return dealt

    window_gradients.deal_passes = deal_passes


def sum_in_rank_order() -> None:
    """The sums of the ranks are added one after another, not along the tree."""

    def reduced(
        tree: TreeSum, parameters: Any, facts: Tensor, dealt: Sequence[Sequence[int]], ranks: Ranks
    ) -> tuple[list[Tensor], Tensor]:
        gradients = []
        for place, parameter in enumerate(parameters):
            own = parameter.detach() * 0
            for node in tree.nodes:
                if node.gradients is not None:
                    own += node.gradients[place]
            first, *others = ranks.all_gather(own).unbind()
            for other in others:
                first += other
            gradients.append(first)
        return gradients, ranks.all_gather(facts).sum(0)

    window_gradients.reduce_nodes = reduced


# Not wrong, but watched


def log_rows() -> None:
    """Append the row numbers of each pass that this rank computes, with its rank, to the file LOG_ROWS."""
    backward = window_gradients._backward
    log = Path(os.environ["LOG_ROWS"]).with_suffix(f".{_RANK}")

    def logged(learner: Learner, batch: Batch, *rest: Any) -> Tensor:
        with log.open("a") as file:
            file.write(json.dumps(batch.rows) + "\n")
        return backward(learner, batch, *rest)

    window_gradients._backward = logged


def log_inference() -> None:
    """Append the size of each batch that this rank scores or completes to the file LOG_ROWS, with its rank."""
    from llamatune.inference import evaluate, model_completions

    log = Path(os.environ["LOG_ROWS"]).with_suffix(f".{_RANK}")

    def logged(work: Callable[..., Any]) -> Callable[..., Any]:
        def both(model: Any, batch: Any, *rest: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{len(batch.rows if isinstance(batch, Batch) else batch)}\n")
            return work(model, batch, *rest)

        return both

    evaluate.score_batch = logged(evaluate.score_batch)
    model_completions.completions = logged(model_completions.completions)


# Faults of one rank


def out_of_memory() -> None:
    """The host has no memory left when the model is built."""
    from llamatune.training import model_and_optimizer

    def load_model(*arguments: object, **options: object) -> None:
        raise MemoryError

    model_and_optimizer.load_model = load_model  # type: ignore[assignment]


def bug() -> None:
    """An exception that no user can cause, in the third pass."""
    backward, left = window_gradients._backward, [0, 0]

    def failing(*arguments: Any) -> Tensor:
        if not left:
            raise AssertionError("a bug")
        left.pop()
        return backward(*arguments)

    window_gradients._backward = failing


def slow_writer() -> None:
    """Whatever rank 0 writes takes longer than the ranks' timeout."""
    import time

    from llamatune.training import loop
    from llamatune.training.save_and_resume import RunOutput

    def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
        def later(self: RunOutput, *arguments: Any) -> Any:
            if self.ranks.is_first:
                time.sleep(float(os.environ["SLOW_S"]))
            return write(self, *arguments)

        return later

    for name in ("write_best", "write_final", "save_checkpoint", "load_checkpoint"):
        setattr(RunOutput, name, slowly(getattr(RunOutput, name)))
    prune = loop.prune_checkpoints

    def prune_slowly(*arguments: Any) -> None:
        time.sleep(float(os.environ["SLOW_S"]))
        prune(*arguments)

    loop.prune_checkpoints = prune_slowly


def slow_scores() -> None:
    """An evaluation takes a while; each rank that has begun makes the file SCORING, with its rank."""
    import time

    from llamatune.inference import evaluate

    score = evaluate.score_batch

    def slowly(*arguments: Any) -> Any:
        Path(os.environ["SCORING"]).with_suffix(f".{_RANK}").touch()
        time.sleep(0.3)
        return score(*arguments)

    evaluate.score_batch = slowly
