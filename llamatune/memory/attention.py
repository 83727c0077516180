"""The bytes of ``model.attention``: what softmax(q k^T) v keeps for the backward pass, and what it has in flight."""

from __future__ import annotations

from llamatune.memory.ledger import Ledger, Tensor
from llamatune.memory.sizes import Sizes
from llamatune.shapes.attention_kernels import Kernel, choose_kernel, head_room


class AttentionBytes:
    """The tensors of attention by the rule of ``shapes.attention_kernels``.

    ``inputs`` and ``outputs`` are kept for the backward pass; ``flat`` is the output laid out anew, 0 where it is a
    view. ``arranged``: repeated keys and values, heads that are filled up, samples in another order. ``scores`` are in
    flight in softmax, ``shares`` are those kept of plain products.
    """

    def __init__(self, z: Sizes) -> None:
        c, N, lengths, H = z.c, z.N, z.rows.lengths, z.config.num_attention_heads
        several, ragged, head = len(lengths) > 1, len(set(lengths)) > 1, z.config.head_dim
        kernels = {t: choose_kernel(z.capability, z.computed, head, t, len(lengths)) for t in set(lengths)}
        kernel = kernels[max(lengths)]  # on a GPU that of all
        squares = [t * t * H for t in lengths if kernels[t] is Kernel.PRODUCTS]
        by_kernel = sum(t for t in lengths if kernels[t] is not Kernel.PRODUCTS)
        scores, at_once = sum(squares), max(squares, default=0) if ragged else sum(squares)
        room = head_room(kernel, z.capability, z.computed, head)
        Q, K = H * room, z.config.num_key_value_heads * room
        width = Q if squares or kernel in (Kernel.VARLEN, Kernel.EFFICIENT) else K
        one_kernel = not squares and room == head and (not ragged or kernel is Kernel.VARLEN)
        repeated = 2 * N * Q * c if width != K else 0
        filled = N * (Q + 2 * width) * c if room > head else 0
        ordered = N * Q * c * (2 if several and not ragged else 1) if squares else 0
        self.arranged = repeated + filled + ordered
        self.scores = (scores - at_once) * (4 + c) + at_once * (8 + 2 * c)
        self.shares = scores * (4 + c)  # plain products keep them twice: in fp32 for softmax's gradient, and in c
        self.inputs = N * (Q + 2 * width) * c + self.shares
        self.outputs = by_kernel * (Q * c + H * 4)
        self.flat = 0 if one_kernel else N * z.Q * c
        self.gradients = N * (Q + 2 * width) * c + (N * Q * c if ragged and self.flat else 0)
        self.score_gradients = at_once * (8 - c)

    def forward(self, ledger: Ledger) -> None:
        """From q, k and v, which are alive, to an output that the caller makes."""
        arranged = ledger.make("keys and values repeated, heads filled up, samples in order", self.arranged)
        ledger.use("scores and their softmax", self.scores)
        ledger.use("shares, output, and output laid out anew", self.shares + self.outputs + 2 * self.flat)
        ledger.free(arranged)

    def backward(self, ledger: Ledger) -> Tensor:
        """From the gradient of the output to those of q, k and v."""
        gradients = ledger.make("gradients of attention's inputs", self.gradients)
        ledger.use("gradient of the scores", self.score_gradients)
        return gradients
