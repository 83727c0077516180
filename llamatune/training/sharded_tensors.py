"""What a rank keeps of weights and optimizer state as runs of the whole tensors, which any number of ranks can read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llamatune.checkpoints.sharded_checkpoint import StoredTensors, run_name
from llamatune.errors import CheckpointError
from llamatune.model.blockwise_8bit import BLOCK
from llamatune.shapes.parameter_shards import Shard
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.optimizers.optimizer import State


def owned_runs(learner: Learner) -> dict[str, Tensor]:
    """What this rank writes. What ranks share, blocks of a quantised state and step counts, one of them writes."""
    runs = {}
    for name, parameter in learner.parameters.items():
        shard = _shard(learner, name)
        runs[run_name(name, shard.begin)] = parameter.detach().view(-1)
        state = learner.optimizer.state.get(name, {})
        for key, begin, _, owned in _places(state, shard):
            run = state[key].view(-1)[owned.start - begin : owned.stop - begin]
            runs[run_name(f"{name}/{key}", owned.start)] = run
    return {name: run for name, run in runs.items() if len(run)}


@torch.no_grad()
def restore_runs(learner: Learner, stored: StoredTensors) -> None:
    """Fill weights and optimizer state of this rank from a checkpoint of any number of ranks.

    Raises:
        CheckpointError: it has other weights, or the state of another optimizer.
    """
    if learner.parameters.keys() != stored.weights():
        raise CheckpointError("its tensors are not those that this run trains", stored.path)
    for name, parameter in learner.parameters.items():
        shard = _shard(learner, name)
        if not stored.fits(name, parameter.dtype, shard.whole):
            raise CheckpointError(f"its {name} has another shape or dtype", stored.path)
        stored.fill(parameter, name, shard.begin)
    optimizer = learner.optimizer
    for name in stored.states():
        if name not in learner.parameters:
            raise CheckpointError(f"optimizer state of the unknown parameter {name}", stored.path)
        state = optimizer.rule.fresh_state(learner.parameters[name])
        for key, begin, whole, _ in _places(state, _shard(learner, name)):
            if not stored.fits(f"{name}/{key}", state[key].dtype, whole):
                raise CheckpointError(f"its state of {name} is another optimizer's", stored.path)
            stored.fill(state[key], f"{name}/{key}", begin)
        optimizer.state[name] = state


def _shard(learner: Learner, name: str) -> Shard:
    sharded = learner.sharded
    return Shard.of(learner.parameters[name].shape) if sharded is None else sharded.shards[name]


def _places(state: State, shard: Shard) -> Iterator[tuple[str, int, int, range]]:
    """For each tensor of the state of a slice: where it begins in the ``whole`` one, and the part that it owns."""
    held, owned, blocks = shard.held_blocks(BLOCK), shard.owned_blocks(BLOCK), -(-shard.whole // BLOCK)
    for key, tensor in state.items():
        if tensor.dim() == 0:
            yield key, 0, 1, range(0 if shard.rank else 1)
        elif key.endswith("_largest"):
            yield key, held.start, blocks, owned
        elif f"{key}_largest" in state:
            yield key, held.start * BLOCK, blocks * BLOCK, range(owned.start * BLOCK, owned.stop * BLOCK)
        else:
            yield key, shard.begin, shard.whole, range(shard.begin, shard.end)
