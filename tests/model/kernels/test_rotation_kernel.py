"""The rotation kernel against the plain functions in fp64: grouped heads, odd head sizes, ragged rows, batches."""

import pytest
import torch
from kernel_judges import DTYPES, assert_as_plain

from llamatune.model.fused.operations import rotate_back, rotate_in_place
from llamatune.model.rope import Rotation, rotary_angles, rotate

HEADS = pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 8), (4, 4, 20), (3, 1, 100)])


def angles(positions: torch.Tensor, size: int, dtype: torch.dtype) -> Rotation:
    """As the plain functions see them: rounded to the dtype of q and k."""
    cos, sin = rotary_angles(positions, size, 10000.0)
    return cos.to(dtype).float(), sin.to(dtype).float()


@DTYPES
@HEADS
def test_a_ragged_row(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    rotation = angles(torch.cat((torch.arange(9), torch.arange(4)))[None], size, dtype)
    q, k = torch.randn(13, heads * size).to(dtype), torch.randn(13, kv_heads * size).to(dtype)
    assert_as_plain(rotate_in_place, q, k, *rotation)
    assert_as_plain(rotate_back, q, *rotation)
    wider = torch.randn(13, heads * size + 8).to(dtype)[:, : heads * size]  # rows that lie apart
    assert_as_plain(rotate_back, wider, *rotation)


@DTYPES
@HEADS
@pytest.mark.parametrize("shared", [True, False], ids=["one position for all rows", "a position a row"])
def test_a_batch(shared: bool, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    positions = torch.arange(5)[None] if shared else torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    q, k = (
        torch.randn(2, 5, count * size).to(dtype).view(2, 5, count, size).transpose(1, 2) for count in (heads, kv_heads)
    )
    assert_as_plain(rotate, q, k, *angles(positions, size, dtype))
