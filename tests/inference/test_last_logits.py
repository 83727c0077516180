"""Logits of the next token: the product with the head in portions of the vocabulary, in fp32 on a CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from llamatune.inference import last_logits as module
from llamatune.inference.last_logits import last_logits, logits_of_the_row


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("vocabulary", [7, 1000, 1001])
def test_portions_give_the_logits_of_one_product(rows: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 3, 48, generator=generator)
    W = torch.randn(vocabulary, 48, generator=generator)
    exact = F.linear(hidden[:, -1].double(), W.double())
    with torch.inference_mode(), mock.patch.object(module, "HEAD_WEIGHTS_OF_A_THREAD", 48 * 100):
        found, of_row = last_logits(hidden, W), logits_of_the_row(hidden[None, :, -1], W)
    for logits in (found, of_row):
        assert logits.shape == (rows, vocabulary)
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
