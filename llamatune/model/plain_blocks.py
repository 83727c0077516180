"""Plain blocks in the place of fused ones, which take neither a cache nor several rows, while a model answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llamatune.model.fused.block import FusedBlock
from llamatune.model.streamed_blocks import StreamedBlocks
from llamatune.model.transformer import Block, Transformer


class _PlainBlock(Block):
    def __init__(self, block: Block) -> None:
        self.take_layers_of(block)


@contextlib.contextmanager
def answering(model: Transformer, streamed: StreamedBlocks | None) -> Iterator[None]:
    """Within the block a model that is trained can generate, without dropout; after it all is as before.

    ``streamed`` brings the weights of its blocks, if they do not lie on the device.
    """
    layers, was_training = model.model.layers, model.training
    own = list(layers)
    try:
        for index, block in enumerate(own):
            if isinstance(block, FusedBlock):
                layers[index] = plain = _PlainBlock(block)
                if streamed is not None:
                    streamed.attach_to(plain, index)
        model.eval()
        yield
    finally:
        for index, block in enumerate(own):
            layers[index] = block
        model.train(was_training)
