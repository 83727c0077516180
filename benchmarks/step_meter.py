"""Step meter: the bytes of tensors that a training step needs, from a step on tensors without content.

The step is that of training (``build_learner``, ``make_update``) on tensors that have a shape but no content (torch's
FakeTensorMode), so LLaMA-2-7B takes seconds on one core and no memory. Not counted: what a kernel allocates inside
itself, the allocator's fragments, the CUDA context. SDPA is the CPU's flash kernel, which keeps what CUDA's keeps: the
output and one number per row and head.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from llamatune.benchmarking.category_meter import Followed, StorageMeter
from llamatune.data.batches import Batch, Prepared, Split
from llamatune.events import ignore_event, never_stop
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.recompute_levels import Levels, period_of
from llamatune.shapes.tile_sizes import LOGIT_BYTES_AT_ONCE, WEIGHTS_AT_ONCE, WIDE_LOGITS_AT_ONCE
from llamatune.spec import RunSpec
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.training_step import make_update

TARGET_SHARE = 0.46
"""The share of Alpaca's tokens that are trained, by LLaMA-2's tokenizer and the ``alpaca`` template."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of the tensors of a training step after the first one; a storage counts once, however many views it has.

    ``weights_bytes`` are the base, ``resident_bytes`` what is alive between steps (base, adapter, optimizer state),
    ``after_forward_bytes`` what is alive when the first backward pass begins, ``peak_bytes`` the most at any time.
    ``largest_tensor_bytes`` is the largest storage made during the step. ``saved_bytes_per_token_layer`` is what one
    more block adds to ``after_forward_bytes`` for each token.
    """

    weights_bytes: int
    resident_bytes: int
    after_forward_bytes: int
    peak_bytes: int
    largest_tensor_bytes: int
    saved_bytes_per_token_layer: float


class StepMeter(StorageMeter):  # type: ignore[no-untyped-call]
    """Follows the storages of a step, and notes what is alive when its first backward pass begins.

    Over a FakeTensorMode, operations on real tensors alone (the positions of the targets) stay real, and reading a
    number from a tensor without content gives 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start_window()

    def start_window(self) -> None:
        """Reset the peak to what is alive now."""
        self.peak_bytes, self.largest_bytes = self.live_bytes, 0
        self.backward_began_bytes: int | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.backward_began_bytes is None and torch._C._current_graph_task_id() != -1:
            self.backward_began_bytes = self.live_bytes
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = given and not any(isinstance(tensor, FakeTensor) for tensor in given)
        with unset_fake_temporarily() if real else contextlib.nullcontext():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _change(self, storage: Followed, size: int) -> None:
        super()._change(storage, size)
        if size > 0:
            self.largest_bytes = max(self.largest_bytes, storage.bytes)


def measure_step(
    spec: RunSpec, config: LlamaConfig, rows: int, row_tokens: int, target_share: float = TARGET_SHARE
) -> StepMemory:
    """The memory of a step of ``spec`` on a model of this shape, each micro-batch ``rows`` rows of ``row_tokens``.

    No path of ``spec`` is opened, and weights are random. More than one ``gradient_accumulation_steps`` are measured as
    two: from the second one on the gradient is already allocated.
    """
    batch = even_batch(rows, row_tokens, target_share)
    whole = _run(spec, config, batch)
    period = period_of(spec.training.activation_checkpointing)
    shallow, deeper = (_run(spec, _of_depth(config, depth), batch) for depth in (period, 2 * period))
    saved = (deeper.after_forward_bytes - deeper.resident_bytes) - (
        shallow.after_forward_bytes - shallow.resident_bytes
    )
    return StepMemory(
        whole.weights_bytes,
        whole.resident_bytes,
        whole.after_forward_bytes,
        whole.peak_bytes,
        whole.largest_bytes,
        saved / (period * batch.tokens),
    )


@dataclass(frozen=True)
class _Run:
    weights_bytes: int
    resident_bytes: int
    after_forward_bytes: int
    peak_bytes: int
    largest_bytes: int


def _of_depth(config: LlamaConfig, layers: int) -> LlamaConfig:
    return LlamaConfig(**{**vars(config), "num_hidden_layers": layers})


@contextlib.contextmanager
def _at_once_as_on_a_gpu() -> Iterator[None]:
    """Weights and logits in portions of a GPU's size."""
    before = [(sizes, sizes["cpu"]) for sizes in (WEIGHTS_AT_ONCE, LOGIT_BYTES_AT_ONCE, WIDE_LOGITS_AT_ONCE)]
    for sizes, _ in before:
        sizes["cpu"] = sizes["cuda"]
    try:
        yield
    finally:
        for sizes, size in before:
            sizes["cpu"] = size


def _run(spec: RunSpec, config: LlamaConfig, batch: Batch, levels: Levels | None = None) -> _Run:
    with _at_once_as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), StepMeter() as meter:
        learner = build_learner(spec, _inputs_without_data(spec, config), ignore_event, never_stop, levels)
        micro_batches = [batch] * min(2, spec.training.gradient_accumulation_steps)
        _step(spec, learner, micro_batches, 0)  # makes the optimizer's state
        resident = meter.live_bytes
        meter.start_window()
        _step(spec, learner, micro_batches, 1)
        trained = {id(parameter) for parameter in learner.parameters.values()}
        weights = {tensor for tensor in learner.model.state_dict(keep_vars=True).values() if id(tensor) not in trained}
    assert meter.backward_began_bytes is not None, "the step had no backward pass"
    return _Run(
        sum(tensor.numel() * tensor.element_size() for tensor in weights),
        resident,
        meter.backward_began_bytes,
        meter.peak_bytes,
        meter.largest_bytes,
    )


def _step(spec: RunSpec, learner: Learner, micro_batches: Sequence[Batch], window: int) -> None:
    make_update(learner, micro_batches, spec.training, window, spec.usual_learning_rate)


def _inputs_without_data(spec: RunSpec, config: LlamaConfig) -> Inputs:
    count = count_parameters(config, spec.adapter)
    no_data = cast(Prepared, None)  # building a learner opens none
    return Inputs(config, None, "", no_data, None, None, {}, count, torch.device("cpu"))


def even_batch(rows: int, row_tokens: int, target_share: float, input_ids: Tensor | None = None) -> Batch:
    """A batch of rows of equal length whose last tokens are targets, made as training makes its own.

    ``input_ids`` (rows, row_tokens) are 1 everywhere unless they are given.
    """
    ids = torch.ones(rows * row_tokens) if input_ids is None else input_ids
    targets = max(1, round(row_tokens * target_share))
    mask = torch.zeros(rows, row_tokens, dtype=torch.uint8)
    mask[:, -targets:] = 1
    tensors = {
        "input_ids": ids.reshape(-1).int(),
        "loss_mask": mask.reshape(-1),
        "offsets": torch.arange(rows + 1) * row_tokens,
        "source_rows": torch.arange(rows),
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.safetensors"
        save_file(tensors, path)
        return Split(path).batch(range(rows))
