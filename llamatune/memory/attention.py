"""The bytes of ``model.attention``: what softmax(q k^T) v keeps for the backward pass, and what it has in flight."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.ledger import Ledger, Tensor
from llamatune.memory.model_sizes import ModelSizes
from llamatune.shapes.attention_kernels import Kernel, beyond_window, choose_kernel, head_room


class AttentionBytes:
    """The tensors of attention by the rule of ``shapes.attention_kernels``.

    ``inputs`` and ``outputs`` are kept for the backward pass; ``flat`` is the output laid out anew, 0 where it is a
    view. ``arranged``: repeated keys and values, heads that are filled up, samples in another order. ``widened`` are
    copies in fp32 that are in flight, ``widened_gradients`` those of the backward pass. ``recurs`` as ``choose_kernel``
    has it.
    """

    def __init__(self, z: ModelSizes, lengths: Sequence[int], recurs: bool = False) -> None:
        c, N, H = z.c, sum(lengths), z.config.num_attention_heads
        head = z.config.head_dim
        cut = beyond_window(lengths, z.config.sliding_window)
        samples = 1 if cut else len(lengths)
        kernels = {
            t: choose_kernel(z.capability, z.computed, head, t, samples, "given" if t in cut else "causal", recurs)
            for t in set(lengths)
        }
        kernel = kernels[max(lengths)]  # on a GPU that of all, or the one that takes most
        ragged = len(set(lengths)) > 1 or (bool(cut) and len(lengths) > 1)
        short = [t for t in lengths if kernels[t] is Kernel.FP32]
        at_once = max(short, default=0) if ragged else sum(short)
        room = head_room(kernel, z.capability, z.computed, head)
        Q, K = H * room, z.config.num_key_value_heads * room
        width = Q if kernel in (Kernel.VARLEN, Kernel.EFFICIENT) else K
        one_kernel = room == head and (not ragged or kernel is Kernel.VARLEN)
        repeated = 2 * N * Q * c if width != K else 0
        filled = N * (Q + 2 * width) * c if room > head else 0
        self.arranged = repeated + filled
        self.widened = at_once * (2 * Q + 2 * K) * 4
        self.widened_gradients = at_once * (4 * Q + 4 * K) * 4
        self.inputs = N * (Q + 2 * width) * c
        self.outputs = N * (Q * c + H * 4)
        self.flat = 0 if one_kernel else N * z.Q * c
        self.gradients = N * (Q + 2 * width) * c + (N * Q * c if ragged and self.flat else 0)

    def forward(self, ledger: Ledger) -> None:
        """From q, k and v, which are alive, to an output that the caller makes."""
        arranged = ledger.make("keys and values repeated, heads filled up, samples in order", self.arranged)
        ledger.use("q, k, v and output in fp32", self.widened)
        ledger.use("output, and output laid out anew", self.outputs + 2 * self.flat)
        ledger.free(arranged)

    def backward(self, ledger: Ledger) -> Tensor:
        """From the gradient of the output to those of q, k and v."""
        gradients = ledger.make("gradients of attention's inputs", self.gradients)
        ledger.use("gradients, q, k, v and output in fp32", self.widened_gradients)
        return gradients
