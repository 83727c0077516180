"""The cross-entropy kernels against the plain functions in fp64."""

import pytest
import torch
from kernel_judges import DTYPES, ODD_ROWS, assert_as_plain
from torch import Tensor

from llamatune.model.kernels import cross_entropy
from llamatune.model.loss import summed_cross_entropy, token_losses

VOCABULARIES = pytest.mark.parametrize("vocabulary", [2, 131, 32000])


@pytest.fixture(params=[16384, 64], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_LARGEST_BLOCK", request.param)


def drawn(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (5 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(vocabulary, (rows, 1))


@DTYPES
@ODD_ROWS
@VOCABULARIES
def test_summed(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, targets = drawn(rows, vocabulary, dtype)
    assert_as_plain(summed_cross_entropy, logits, targets, True)


@DTYPES
@ODD_ROWS
@VOCABULARIES
def test_each_token(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, targets = drawn(rows, vocabulary, dtype)
    targets[::2] = logits[::2].argmax(-1, keepdim=True)
    assert_as_plain(token_losses, logits, targets.squeeze(1))


@DTYPES
def test_a_large_vocabulary(dtype: torch.dtype) -> None:
    """LLaMA-3's: eight blocks, the last in part."""
    logits, targets = drawn(2, 128256, dtype)
    targets[0], targets[1] = 0, 128255
    assert_as_plain(summed_cross_entropy, logits, targets, True)
    assert_as_plain(token_losses, logits, targets.squeeze(1))


ROWS = {
    "alike": torch.zeros(1, 200),
    "large": torch.tensor([3e4, -3e4, 2.9e4, 0.0] * 50)[None],
    "first block at -inf": torch.cat((torch.full((1, 150), -torch.inf), torch.randn(1, 50)), 1),
    "last blocks at -inf": torch.cat((torch.randn(1, 50), torch.full((1, 150), -torch.inf)), 1),
}


@DTYPES
@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("place", [0, 3, 64, 199])
@pytest.mark.parametrize("name", ROWS)
def test_the_edges_of_the_numbers(name: str, place: int, dtype: torch.dtype) -> None:
    """The target may be impossible, or one of several likeliest: the first of them counts."""
    logits, target = ROWS[name].to(dtype), torch.tensor([place])
    assert_as_plain(summed_cross_entropy, logits, target[:, None], True)
    assert_as_plain(token_losses, logits, target)


@DTYPES
@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 100, 199])
def test_a_loss_without_a_value_is_seen(place: int, fault: float, dtype: torch.dtype) -> None:
    """As in the plain function: a NaN or +inf anywhere, or nothing but -inf, makes loss and derivative NaN."""
    logits, targets = drawn(3, 200, dtype)
    logits[1, place] = fault
    if fault == -torch.inf:
        logits[1] = fault
    targets[1] = 7
    single, _ = token_losses(logits, targets.squeeze(1))
    assert single.isnan().tolist() == [False, True, False]
    assert summed_cross_entropy(logits, targets, True).isnan()
    assert logits.isnan().all(1).tolist() == [False, True, False]
    assert logits[[0, 2]].isfinite().all()


@DTYPES
@ODD_ROWS
@VOCABULARIES
def test_without_the_slope(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """The same loss to the bit, and the logits stay."""
    logits, targets = drawn(rows, vocabulary, dtype)
    kept = logits.clone()
    with torch.no_grad():
        found = summed_cross_entropy(kept, targets, False)
        assert torch.equal(kept, logits)
        assert torch.equal(found, summed_cross_entropy(logits, targets, True))
