"""The gradients of an accumulation window: forward and backward passes in lanes, their sum over lanes and ranks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.data.batches import Batch
from llamatune.errors import Stopped
from llamatune.model.fused.window_casts import cast_for_window
from llamatune.model.loss import summed_loss
from llamatune.ranks import Ranks
from llamatune.seeds import derived_seed
from llamatune.shapes.gradient_lanes import count_lanes, deal_passes, own_lanes
from llamatune.training.gradient_sum import TreeSum, reduce_nodes
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.stopping import Stopping


@dataclass(frozen=True)
class WindowFacts:
    """``losses`` are summed over the target tokens of each pass, in float64; ``missing`` names what has no gradient.

    ``stop``: some rank says that the run stops. ``own_tokens`` were computed by this rank; ``waited_s`` is its time in
    messages between ranks.
    """

    losses: Tensor
    missing: list[str]
    own_tokens: int
    stop: bool = False
    waited_s: float = 0.0


def window_gradients(
    learner: Learner,
    passes: Sequence[Batch],
    seed: int,
    window: int,
    lanes: int | None,
    stopping: Stopping,
    ranks: Ranks,
) -> WindowFacts:
    """Compute this rank's passes; ``grad`` of each parameter becomes the sum over all ranks, scaled by the loss scale.

    With ``lanes`` the sum has the same bytes on any number of ranks. None adds gradients one after another, and those
    of several ranks as the collective does. Of a sharded model it is this rank's slice of the sum.

    Raises:
        Stopped: ``stopping`` gave the window up. Several ranks finish it.
    """
    dealt = deal_passes([batch.tokens for batch in passes], lanes or count_lanes(ranks.size))
    own = own_lanes(ranks.rank, ranks.size, len(dealt))
    tree = TreeSum() if lanes else None
    groups = [dealt[lane] for lane in own] if tree else [sorted(index for lane in own for index in dealt[lane])]
    divisor = sum(batch.target_tokens for batch in passes) / learner.scaler.scale
    losses = torch.zeros(len(passes), dtype=torch.float64, device=learner.device)
    parameters, reached = list(learner.parameters.values()), [False] * len(learner.parameters)
    done, count, started = 0, sum(map(len, groups)), time.monotonic()
    with _casts(learner):
        for number, group in enumerate(groups):  # one of each lane, or a single one
            for index in group:
                if done and ranks.size == 1:
                    left_s = (time.monotonic() - started) / done * (count - done)
                    if stopping.in_window(left_s):
                        raise Stopped(f"after {done} of the {count} passes of a window")
                losses[index] = _backward(learner, passes[index], derived_seed(seed, "dropout", window, index), divisor)
                done += 1
            reached = [before or p.grad is not None for before, p in zip(reached, parameters, strict=True)]
            if tree is not None:
                tree.add(own[number], 1, _taken(parameters) if group else None)
    if learner.streamed is not None:
        for _ in range(_most_passes(dealt, ranks) - done):
            learner.streamed.idle(backward=True)
    if learner.sharded is not None:
        # A pass that counts for nothing, of rows of this window: it overflows only if another rank does.
        shortest = min(passes, key=lambda batch: batch.tokens)
        for _ in range(_most_passes(dealt, ranks) - done):
            _backward(learner, shortest, 0, math.inf)
        learner.sharded.take_gradients()
        reached = [p.grad is not None for p in parameters]
    stop, waited_s = False, 0.0
    if ranks.size > 1:
        losses, reached, stop, waited_s = _reduced(
            learner, tree, dealt, losses, reached, stopping.after_passes(), ranks
        )
    elif tree is not None and tree.total is not None:
        for parameter, gradient, has_gradient in zip(parameters, tree.total, reached, strict=True):
            parameter.grad = gradient if has_gradient else None
    own_tokens = sum(passes[index].tokens for group in groups for index in group)
    return WindowFacts(losses, _missing(learner, reached), own_tokens, stop, waited_s)


def _casts(learner: Learner) -> contextlib.AbstractContextManager[None]:
    """What is trained, cast for the products of all passes."""
    with learner.autocast():
        return cast_for_window(learner.model, learner.model.product_dtype)


def _most_passes(dealt: Sequence[Sequence[int]], ranks: Ranks) -> int:
    """The passes of the rank that has most."""
    shares = (own_lanes(rank, ranks.size, len(dealt)) for rank in range(ranks.size))
    return max(sum(len(dealt[lane]) for lane in share) for share in shares)


def _backward(learner: Learner, batch: Batch, dropout_seed: int, divisor: float) -> Tensor:
    """One pass; its summed loss. The graph is freed before the next pass begins."""
    torch.manual_seed(dropout_seed)
    with learner.autocast():
        loss = summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
    with contextlib.nullcontext() if learner.sharded is None else learner.sharded.exchanging():
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients, taken off the parameters; zeros where there is none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _reduced(
    learner: Learner,
    tree: TreeSum | None,
    dealt: Sequence[Sequence[int]],
    losses: Tensor,
    reached: Sequence[bool],
    stop: bool,
    ranks: Ranks,
) -> tuple[Tensor, list[bool], bool, float]:
    """Sum gradients, losses and flags over the ranks; without a ``tree`` each gradient by an all-reduce of its own.

    Returns losses, which parameters a gradient reached, whether some rank says that the run stops, and the seconds.
    """
    if losses.device.type == "cuda":
        torch.cuda.synchronize(losses.device)  # what follows is messages alone
    started, parameters = time.monotonic(), list(learner.parameters.values())
    flags = torch.tensor([stop, *reached], dtype=torch.float64, device=losses.device)
    facts = torch.cat((losses, flags))
    if tree is None:
        summed = _taken(parameters)
        for gradient in summed if learner.sharded is None else ():
            ranks.all_reduce(gradient)
        ranks.all_reduce(facts)
    else:
        summed, facts = reduce_nodes(tree, parameters, facts, dealt, ranks)
    asked, *counts = facts[len(losses) :].tolist()  # the device is waited for here
    for parameter, gradient, count in zip(parameters, summed, counts, strict=True):
        parameter.grad = gradient if count else None
    return facts[: len(losses)], [count > 0 for count in counts], bool(asked), time.monotonic() - started


def _missing(learner: Learner, reached: Sequence[bool]) -> list[str]:
    return [name for name, has_gradient in zip(learner.parameters, reached, strict=True) if not has_gradient]
