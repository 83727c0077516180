"""Gradient reduction over passes and ranks in one fixed order: lanes, and a binary tree over the lanes.

Floating-point addition is not associative, so a sum has the same bytes on any number of ranks only if its order does
not depend on that number. The passes of a window are dealt to lanes by their tokens; a lane adds its passes one after
another; neighbouring lanes are added in pairs, pairs in fours, and so on. Each rank computes consecutive lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.ranks import Ranks
from llamatune.shapes.gradient_lanes import own_lanes


@dataclass
class _Node:
    """The sum of ``size`` lanes from lane ``start`` on; None where none of them has a pass."""

    start: int
    size: int
    gradients: list[Tensor] | None


class TreeSum:
    """Adds lanes, given in order, along the tree. At most one partial sum a level is held: 4 for 8 lanes."""

    def __init__(self) -> None:
        self.nodes: list[_Node] = []

    def add(self, start: int, size: int, gradients: list[Tensor] | None) -> None:
        """Add the sum of ``size`` lanes that begin at ``start``; ``gradients`` is changed in place."""
        node = _Node(start, size, gradients)
        while self.nodes and self.nodes[-1].size == node.size and self.nodes[-1].start % (2 * node.size) == 0:
            left = self.nodes.pop()
            if left.gradients is None:
                left.gradients = node.gradients
            elif node.gradients is not None:
                torch._foreach_add_(left.gradients, node.gradients)
            node = _Node(left.start, 2 * node.size, left.gradients)
        self.nodes.append(node)

    @property
    def total(self) -> list[Tensor] | None:
        """The sum of all lanes, once all have been added."""
        (root,) = self.nodes
        return root.gradients


def reduce_nodes(
    own: TreeSum, parameters: Sequence[nn.Parameter], facts: Tensor, dealt: Sequence[Sequence[int]], ranks: Ranks
) -> tuple[list[Tensor], Tensor]:
    """The gradients of all ranks, summed along the tree, and the element-wise sum of their ``facts`` (float64).

    Each rank receives one slice of every partial sum, adds these along the tree and sends the result to all: the bytes
    of a ring all-reduce. ``parameters`` give the shapes; a rank without a pass has no gradients. The facts travel with
    the result.
    """
    shapes = [parameter.shape for parameter in parameters]
    dtype, device = parameters[0].dtype, parameters[0].device
    elements = sum(shape.numel() for shape in shapes)
    part = -(-elements // ranks.size // 8) * 8  # a multiple of 8: the facts that follow are aligned
    spans = [_filled_nodes(own_lanes(rank, ranks.size, len(dealt)), dealt) for rank in range(ranks.size)]
    padding = torch.zeros(part * ranks.size - elements, dtype=dtype, device=device)
    flat = [
        torch.cat([*(gradient.reshape(-1) for gradient in node.gradients), padding])
        for node in own.nodes
        if node.gradients is not None
    ]
    own.nodes.clear()
    none = torch.empty(0, part, dtype=dtype, device=device)
    starts = range(0, part * ranks.size, part)
    slices = [torch.stack([sums[start : start + part] for sums in flat]) if flat else none for start in starts]
    del flat
    received = ranks.all_to_all(slices, [torch.Size((len(filled), part)) for filled in spans])
    del slices
    own_slice = _sum_of_slices(spans, received, dealt)
    del received
    message = torch.cat((own_slice.view(torch.uint8), facts.to(device).view(torch.uint8)))
    del own_slice
    gathered = ranks.all_gather(message)
    del message
    boundary = part * dtype.itemsize
    summed = [row[:boundary].view(dtype) for row in gathered]
    # Tensors of their own: a kernel's order of addition may depend on the alignment of a view.
    gradients = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    start = 0
    for gradient in gradients:
        _copy_run(summed, start, gradient.view(-1))
        start += gradient.numel()
    return gradients, gathered[:, boundary:].contiguous().view(torch.float64).sum(0)


def _sum_of_slices(
    spans: Sequence[Sequence[tuple[int, int]]], received: Sequence[Tensor], dealt: Sequence[Sequence[int]]
) -> Tensor:
    """One slice of the sum of all lanes, from that of each rank's filled nodes, which are changed in place."""
    place = dict[tuple[int, int], list[Tensor]]()
    for filled, rows in zip(spans, received, strict=True):
        place |= {span: [row] for span, row in zip(filled, rows, strict=True)}
    tree = TreeSum()
    for rank in range(len(spans)):
        for start, size in _aligned_nodes(own_lanes(rank, len(spans), len(dealt))):
            tree.add(start, size, place.get((start, size)))
    assert tree.total is not None  # a window has at least one pass
    return tree.total[0]


def _copy_run(parts: Sequence[Tensor], start: int, into: Tensor) -> None:
    """Fill ``into`` with the elements from ``start`` on of vectors of one length, end to end."""
    done, length = 0, len(parts[0])
    while done < len(into):
        part, place = divmod(start + done, length)
        piece = parts[part][place : place + len(into) - done]
        into[done : done + len(piece)] = piece
        done += len(piece)


def _aligned_nodes(lanes: range) -> list[tuple[int, int]]:
    """The fewest subtrees (start, size) that cover ``lanes``: what ``TreeSum`` holds after adding them."""
    tree = TreeSum()
    for lane in lanes:
        tree.add(lane, 1, None)
    return [(node.start, node.size) for node in tree.nodes]


def _filled_nodes(lanes: range, dealt: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(start, size) for start, size in _aligned_nodes(lanes) if any(dealt[start : start + size])]
