"""torch.compile for ``training.compile``: whether it works on this machine, and compilation before the first step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from llamatune.data.batches import Split
from llamatune.errors import EnvironmentFault
from llamatune.events import Notice, OnEvent
from llamatune.model.loss import summed_loss
from llamatune.spec import RunSpec
from llamatune.training.model_and_optimizer import Learner


@contextlib.contextmanager
def compiler_faults() -> Iterator[None]:
    """Raise a failure of the compiler as ``EnvironmentFault``, in one line."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, ImportError, OSError) as fault:
        reason = str(fault).strip().partition("\n")[0]
        raise EnvironmentFault(
            f"torch.compile does not work here ({reason})",
            "training.compile",
            "set it to false; a CPU needs a C++ compiler such as g++, a GPU Triton and a C compiler",
        ) from fault


def check_compiler(device: torch.device) -> None:
    """Compile a tiny function, so that a missing compiler is reported before weights are loaded."""
    with compiler_faults():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))


def compile_ahead(spec: RunSpec, learner: Learner, split: Split, on_event: OnEvent) -> None:
    """Compile by one micro-batch, forward and backward, and drop its gradient.

    It is always the same rows, also in a resumed run, so that the compiler sees the same sizes.
    """
    started = time.monotonic()
    batch = split.batch(list(range(min(spec.training.micro_batch_size, len(split)))))
    with compiler_faults():
        with learner.autocast():
            loss = summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
        loss.backward()  # type: ignore[no-untyped-call]
    if learner.sharded is not None:
        learner.sharded.take_gradients()
    learner.optimizer.zero_grad()
    on_event(Notice(f"compiled what lies between the matrix products in {time.monotonic() - started:.1f} s"))
