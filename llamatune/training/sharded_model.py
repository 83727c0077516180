"""Full fine-tuning on several ranks: each holds a slice of every parameter, of its gradient and of its optimizer state.

Torch's ``fully_shard`` gathers the weights of a block before its forward and its backward pass, and adds up its
gradients over the ranks after it. Every pass is such a message, so all ranks must run as many passes as the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llamatune.model.transformer import Transformer
from llamatune.ranks import Ranks
from llamatune.shapes.parameter_shards import Shard


class ShardedModel:
    """A model without weights, made on the meta device, cut into slices whose content is undefined at first.

    ``parameters`` are this rank's slices, plain tensors that share their memory with the model: rows of each
    parameter, perhaps none. ``shards`` say which. A slice gets its gradient from ``take_gradients``.
    """

    def __init__(self, model: Transformer, device: torch.device, ranks: Ranks) -> None:
        # Only here: it loads what no other run needs.
        from torch.distributed.fsdp import fully_shard

        self.shapes = dict(model.config.parameter_shapes())
        self._model, self._ranks = model, ranks
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        model.requires_grad_(True)
        units = [fully_shard(unit, mesh=mesh, reshard_after_forward=True) for unit in (*model.model.layers, model)]
        model.to_empty(device=device)
        with self.exchanging():
            for unit in units:  # now, or the first pass would move slices that are not filled up to the longest
                unit.unshard()
                unit.reshard()
        self._sharded = dict(model.named_parameters())
        with torch.no_grad():
            local = {name: parameter.to_local() for name, parameter in self._sharded.items()}  # type: ignore[attr-defined]
        self.parameters = {name: nn.Parameter(tensor) for name, tensor in local.items()}
        self.shards = {name: Shard.of(shape, ranks.rank, ranks.size) for name, shape in self.shapes.items()}

    def rows(self, name: str) -> range:
        """The rows of a parameter that are held here."""
        shard, row = self.shards[name], math.prod(self.shapes[name][1:])
        return range(shard.begin // row, shard.end // row)

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around a pass: its messages fail in one line where another rank has ended."""
        with self._ranks.exchanging():
            yield

    def idle(self) -> None:
        """Take part in the messages of a forward pass that other ranks compute."""
        with torch.no_grad(), self.exchanging():
            self._model(torch.zeros(1, 2, dtype=torch.int64, device=self._model.device))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the gradients of the passes since the last call to ``parameters``, summed over the ranks."""
        for name, parameter in self._sharded.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                # ``fully_shard`` takes the mean. Scaled losses in its place would overflow fp16 sooner.
                gradient = gradient.to_local().mul_(self._ranks.size)  # type: ignore[attr-defined]
            self.parameters[name].grad = gradient

    def joined_norms(self, norms: Tensor) -> Tensor:
        """The norms of whole vectors from those of this rank's slices; the same bits on every rank."""
        return self._ranks.all_gather(norms.double().square()).sum(0).sqrt().to(norms.dtype)

    # Whole tensors, one at a time: all ranks gather each, and the first writes it.

    def whole_tensors(self) -> Callable[[str], Tensor]:
        """On the first rank: gives each parameter once, in the order of ``shapes``, while the others ``serve``."""
        names = iter(self.shapes)

        def whole(name: str) -> Tensor:
            assert name == next(names), f"{name} is not the next parameter"
            return self._gathered(name)

        return whole

    def serve(self) -> None:
        """On the other ranks: send all that the first asks for."""
        for name in self.shapes:
            self._gathered(name)

    @torch.no_grad()
    def _gathered(self, name: str) -> Tensor:
        shape, local = self.shapes[name], self.parameters[name].detach()
        most = -(-shape[0] // self._ranks.size)
        filled = local.new_zeros(most, *shape[1:])
        filled[: len(local)] = local
        return self._ranks.all_gather(filled).view(-1, *shape[1:])[: shape[0]]
