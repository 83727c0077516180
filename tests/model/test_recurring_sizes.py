"""Rows of 16-bit products on a CPU are filled up to sizes that recur, and nothing of what fills them is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.model import loss as loss_module
from llamatune.model.initialise import initialise
from llamatune.model.loss import summed_loss, target_losses
from llamatune.model.transformer import Transformer
from llamatune.shapes import tile_sizes
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.recurring_sizes import filled_up, logit_rows

LENGTHS = (11, 1, 17)  # 29 tokens, filled up to 32


def test_sizes_recur_and_are_little_more() -> None:
    sizes = {filled_up(rows, "cpu", 2) for rows in range(1, 4097)}
    assert len(sizes) == 32 + 3 * 16
    for rows in range(1, 4097):
        size = filled_up(rows, "cpu", 2)
        assert rows <= size == filled_up(size, "cpu", 2)
        assert size - rows < max(16, rows / 16)
        assert size % 16 == 0


def test_without_amx_few_rows_are_filled_up_less() -> None:
    for rows in range(1, 4097):
        size = filled_up(rows, "cpu", 2, has_amx=False)
        assert rows <= size == filled_up(size, "cpu", 2, has_amx=False) <= filled_up(rows, "cpu", 2)
        assert size == rows if rows < 32 else size - rows < rows / 16
    assert len({filled_up(rows, "cpu", 2, has_amx=False) for rows in range(512, 1025)}) == 17


@pytest.mark.parametrize(("device", "element_bytes"), [("cuda", 2), ("cpu", 4), ("cpu", 8)])
def test_only_16_bit_products_on_a_cpu_are_filled_up(device: str, element_bytes: int) -> None:
    assert all(filled_up(rows, device, element_bytes) == rows for rows in range(1, 600))


@pytest.mark.parametrize("vocabulary", [32000, 128256, 512, 10**8])
def test_logits_in_flight_are_a_number_of_rows_that_recurs(vocabulary: int) -> None:
    rows = logit_rows(vocabulary, "cpu", 2)
    assert rows == filled_up(rows, "cpu", 2) or rows < 16
    assert 1 <= rows <= max(1, (1 << 24) // (2 * vocabulary))


@pytest.mark.parametrize(
    ("precision", "held", "expected"),
    [(torch.bfloat16, torch.bfloat16, 32), (torch.bfloat16, torch.float32, 32), (None, torch.float32, 29)],
)
def test_what_fills_up_changes_no_loss_and_no_gradient(
    precision: torch.dtype | None, held: torch.dtype, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Transformer(LlamaConfig(48, 100, 3, 6, 2, 131))
    initialise(model, 0, 0.15)
    model.to(held)
    model.lm_head.weight.requires_grad_(False)
    ids = torch.randint(3, 131, (1, sum(LENGTHS)))
    labels = ids.clone()
    labels[:, :5] = -100
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))

    def run() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = summed_loss(model, ids, labels, LENGTHS)
            each, correct = target_losses(model, ids, labels, LENGTHS)
        loss.backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        return loss.detach(), each, correct, gradients

    found = run()
    assert seen == [expected, expected]
    monkeypatch.setattr(loss_module, "filled_up", lambda rows, *_: rows)
    wanted = run()
    assert seen[2:] == [29, 29]
    close = {"atol": 1e-2, "rtol": 1e-2} if precision else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(found[0], wanted[0], **close)
    torch.testing.assert_close(found[1], wanted[1], **close)
    assert (found[1] > 0).sum() == (labels != -100).sum() - 2  # the first tokens of the second and third sample
    for gradient, other in zip(found[3], wanted[3], strict=True):
        assert (gradient - other).norm() <= 2e-2 * other.norm() if precision else torch.equal(gradient, other)


def test_the_loss_of_many_chunks_and_pieces_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(29, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    targets = torch.randint(0, 50, (29,))

    def run() -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        loss = loss_module._FrozenHeadLoss.apply(leaf, weight, targets)
        loss.backward()
        return loss.detach(), leaf.grad

    whole = run()
    leaf = hidden.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf @ weight.T, targets, reduction="sum")
    expected.backward()
    monkeypatch.setattr(loss_module, "logit_rows", lambda *_: 7)
    monkeypatch.setitem(tile_sizes.WIDE_LOGITS_AT_ONCE, "cpu", 150)
    for loss, gradient in (whole, run()):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "repeated"), [(torch.bfloat16, 3), (torch.float32, 3), (torch.bfloat16, 6)])
def test_prompts_are_read_in_products_of_rows_that_recur(dtype: torch.dtype, repeated: int, amx: bool) -> None:
    """The last block computes the last token of each prompt, and has rows of its own to fill up."""
    model = Transformer(LlamaConfig(48, 100, 2, 6, 2, 131)).eval()
    initialise(model, 0, 0.15)
    model.to(dtype)
    seen: list[int] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    lengths = (LENGTHS * 2)[:repeated]
    made = complete(model, [[1] * length for length in lengths], Sampling(1, temperature=0), ())
    assert [len(one.ids) for one in made] == [1] * repeated
    bf16 = dtype == torch.bfloat16
    assert seen == [filled_up(sum(lengths), "cpu", 2 if bf16 else 4, amx), 16 if bf16 and amx else repeated]
