"""The order of the rows of q and k, which differs between formats, and the change from one to the other.

Hugging Face rotates the first half of a head against the second, (x0, x_{E/2}), ...: the halves are apart. Meta
rotates neighbours as pairs, (x0, x1), (x2, x3), ..., as llama.cpp does for its architecture ``llama``: they are
interleaved.
"""

from __future__ import annotations

from torch import Tensor


def is_rotated(name: str) -> bool:
    """Whether the rows of the tensor are rotated in pairs: the weights and biases of q and k."""
    return name.rpartition(".")[0].endswith(("q_proj", "k_proj"))


def rows_apart(W: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads * E, ...), from interleaved pairs to halves of a head."""
    return W.reshape(-1, head_dim // 2, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)  # (H, 2, E/2, ...)


def rows_interleaved(W: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads * E, ...), from halves of a head to interleaved pairs."""
    return W.reshape(-1, 2, head_dim // 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)  # (H, E/2, 2, ...)


def interleaved_row(row: int, head_dim: int) -> int:
    """Where a row of the order of halves lies among interleaved pairs."""
    head, within = divmod(row, head_dim)
    half, pair = divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half
