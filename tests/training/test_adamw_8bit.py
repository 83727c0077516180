"""8-bit AdamW beside torch's: how close it stays, what it holds, and that its state survives bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_tools import progress_at
from torch import Tensor, nn

from llamatune.checkpoints.training_checkpoint import read_run_state, save_run_state
from llamatune.model.blockwise_8bit import BLOCK, BlockwiseCode, dynamic_levels
from llamatune.shapes.tile_sizes import ELEMENTS_AT_ONCE
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import AdamW, Optimizer

SHAPES = [(64, 128), (33, 200), (5000,), (12, 40)]
"""Two of whole blocks and not, one vector, one too small to be quantised."""
RATE = 0.01
BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.05


def problem(seed: int = 0) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Weights, and targets whose sizes differ by a factor of a hundred from row to row."""
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    targets = [
        torch.randn(shape, generator=generator) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        for shape in SHAPES
    ]
    return weights, targets


def gradients(weights: list[nn.Parameter], targets: list[Tensor], step: int) -> float:
    """Noisy gradients of the squared distance, set as ``.grad``; the distance."""
    generator = torch.Generator().manual_seed(1000 + step)
    total = 0.0
    for weight, target in zip(weights, targets, strict=True):
        offset = weight.detach() - target
        noise = torch.rand(weight.shape, generator=generator) + 0.5
        weight.grad = offset * noise / weight.numel() ** 0.5
        total += float(offset.square().mean())
    return total


def named(weights: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {f"weight{number}": weight for number, weight in enumerate(weights)}


def in_8_bits(weights: list[nn.Parameter]) -> Optimizer:
    return Optimizer(named(weights), AdamW8bit(BETAS, EPS, DECAY))


def trained(rule: type[AdamW] | type[AdamW8bit], steps: int) -> tuple[list[nn.Parameter], list[float]]:
    weights, targets = problem()
    optimizer = Optimizer(named(weights), rule(BETAS, EPS, DECAY))
    losses = []
    for step in range(steps):
        losses.append(gradients(weights, targets, step))
        optimizer.step(RATE)
    return weights, losses


def test_it_follows_fp32_adamw() -> None:
    """After 300 updates the weights are within 6 % of the way that fp32 went, and the loss is within 1 %.

    bitsandbytes 0.50's AdamW8bit lies as far from fp32 on the same problem (4.81 to 5.42 %, ours 4.80 to 5.42 %).
    """
    start, _ = problem()
    found, found_losses = trained(AdamW8bit, 300)
    expected, expected_losses = trained(AdamW, 300)
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    assert found_losses == pytest.approx(expected_losses, rel=0.01)
    for ours, theirs, first in zip(found, expected, start, strict=True):
        assert float((ours - theirs).detach().norm() / (theirs - first).detach().norm()) < 0.06
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-5)  # the small one stays in fp32


def test_the_first_update_is_that_of_fp32() -> None:
    """Nothing is rounded before it is remembered."""
    found, expected = trained(AdamW8bit, 1)[0], trained(AdamW, 1)[0]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_comes_back_is_within_half_a_level() -> None:
    x = torch.randn(40 * BLOCK, generator=torch.Generator().manual_seed(2)) ** 3
    for signed, values in ((True, x), (False, x.square())):
        code = BlockwiseCode(signed, torch.device("cpu"))
        found = code.decode(*code.encode(values))
        largest = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
        # Relative to the block's largest: half the widest cell, and the gap below -1 of the signed map.
        error = ((found - values).view(-1, BLOCK) / largest).abs().max()
        assert error < (0.0075 if signed else 0.0037)
        assert bool((found[values > 0] > 0).all()) or signed


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_gets_the_nearest_level(signed: bool) -> None:
    """Against a search, at ordinary values, at every middle between levels, and one bit beside it."""
    levels = dynamic_levels(signed)
    middles = (levels[1:] + levels[:-1]) / 2
    if not signed:
        middles[0] = 0.0  # nothing above zero becomes zero
    beside = [torch.nextafter(middles, torch.tensor(side)) for side in (-2.0, 2.0)]
    values = torch.cat((middles, *beside, levels, torch.logspace(-12, 0, 5000), torch.zeros(1)))
    values = values.clamp(-1.0 if signed else 0.0, 1.0)
    if signed:
        values = torch.cat((values, -values))
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=1.0)  # every block's largest is 1
    codes, largest = BlockwiseCode(signed, torch.device("cpu")).encode(blocks.flatten())
    assert bool((largest == 1).all())
    assert torch.equal(codes.int(), torch.bucketize(blocks.flatten(), middles, out_int32=True))


def test_no_second_moment_vanishes_beside_a_first_one() -> None:
    """An element whose gradients are 1e-5 of its block's largest still makes steps of ordinary size."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = Optimizer({"weight": weight}, AdamW8bit())
    for _ in range(50):
        weight.grad = torch.full((64, 64), 1e-5)
        weight.grad[:, 0] = 1.0
        before = weight.detach().clone()
        optimizer.step(0.01)
        assert float((weight.detach() - before).abs().max()) < 0.02


def state_after_one_update(weight: nn.Parameter) -> dict[str, Tensor]:
    weight.grad = torch.ones_like(weight)
    optimizer = Optimizer({"weight": weight}, AdamW8bit())
    optimizer.step(0.01)
    return optimizer.state["weight"]


def test_the_state_takes_2_03_bytes_a_parameter() -> None:
    weight = nn.Parameter(torch.zeros(512, 1024))
    state_bytes = sum(tensor.nbytes for tensor in state_after_one_update(weight).values())
    assert state_bytes / weight.numel() == pytest.approx(2 + 8 / 256, rel=1e-4)
    small = state_after_one_update(nn.Parameter(torch.zeros(4095)))
    assert {tensor.dtype for tensor in small.values()} == {torch.float32}


@pytest.fixture(params=[1 << 24, 1 << 12], ids=["at once", "in pieces"])
def elements_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENTS_AT_ONCE, "cpu", request.param)


def test_buckets_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(AdamW8bit, 20)[0]
    monkeypatch.setitem(ELEMENTS_AT_ONCE, "cpu", 1 << 10)
    for ours, theirs in zip(trained(AdamW8bit, 20)[0], whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("elements_at_once")
def test_saved_and_restored_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights, targets = problem()
    optimizer = in_8_bits(weights)
    for step in range(12):
        gradients(weights, targets, step)
        optimizer.step(RATE)
        if step == 5:
            save_run_state(tmp_path / "state", lambda _: None, optimizer.state_tensors(), progress_at(6))
            middle = [weight.detach().clone() for weight in weights]
    again = [nn.Parameter(weight) for weight in middle]
    resumed = in_8_bits(again)
    resumed.restore(read_run_state(tmp_path / "state").optimizer, tmp_path / "state")
    for step in range(6, 12):
        gradients(again, targets, step)
        resumed.step(RATE)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, weights, strict=True))
    found, expected = resumed.state_tensors(), optimizer.state_tensors()
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected)
    assert torch.uint8 in {tensor.dtype for tensor in found.values()}


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    weights, targets = problem()
    optimizer = in_8_bits(weights)
    gradients(weights, targets, 0)
    weights[1].grad = None
    before = weights[1].detach().clone()
    optimizer.step(RATE)
    assert torch.equal(weights[1], before)
    gradients(weights, targets, 1)
    optimizer.step(RATE)
    assert [int(optimizer.state[name]["step"]) for name in named(weights)] == [2, 1, 2, 2]
