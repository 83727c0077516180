"""The kernel of 8-bit AdamW against the plain update."""

from __future__ import annotations

import pytest
import torch
from kernel_judges import DEVICE
from torch import Tensor, nn

from llamatune.model.blockwise_8bit import BLOCK
from llamatune.model.kernels import adamw_8bit as kernel
from llamatune.model.kernels.choice import running_kernels
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import Optimizer

SHAPES = [(64, 128), (33, 200), (5000,), (12, 40), (4096,)]
"""Of whole blocks and not, a vector, one too small to be quantised, and the smallest that is."""
EXACT = 1 - 2**-7
"""A beta2 with which the order of products does not round: torch multiplies otherwise on a CPU than on a GPU."""


def trained(device_type: str | None, rule: AdamW8bit, grads: list[list[Tensor]]) -> Optimizer:
    """Weights and state after an update with each of ``grads``."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    parameters = {str(n): nn.Parameter(torch.randn(grad.shape, generator=generator)) for n, grad in enumerate(grads[0])}
    optimizer = Optimizer(parameters, rule)
    with running_kernels(device_type):
        for of_step in grads:
            for parameter, grad in zip(parameters.values(), of_step, strict=True):
                parameter.grad = grad.clone()
            optimizer.step(0.01)
    return optimizer


def drawn(steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    """Gradients whose squares are exact in fp32 and whose rows differ in size."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    return [
        [
            (scale * 10.0 ** (step % 3) * torch.randn(shape, generator=generator) ** 3).bfloat16().float()
            for shape in SHAPES
        ]
        for step in range(steps)
    ]


def assert_alike(found: Optimizer, expected: Optimizer) -> None:
    """Every bit of the state; the weights but for the last bit of a root, which torch rounds otherwise on a CPU."""
    tensors = expected.state_tensors()
    for name, tensor in found.state_tensors().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0, equal_nan=True)
    for name, parameter in found.parameters.items():
        torch.testing.assert_close(parameter, expected.parameters[name], rtol=2.4e-7, atol=1e-8, equal_nan=True)


@pytest.fixture(params=[(16, 1024), (4, 3)], ids=["each block once", "in strides"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a program, and programs of a parameter at most."""
    blocks, programs = request.param
    monkeypatch.setattr(kernel, "_BLOCKS_AT_ONCE", blocks)
    monkeypatch.setattr(kernel, "_PROGRAMS", programs)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("beta1", "decay"), [(0.9, 0.05), (0.3, 0.0), (0.0, 0.0)])
def test_every_bit(beta1: float, decay: float) -> None:
    rule = AdamW8bit((beta1, EXACT), 1e-8, decay)
    assert_alike(trained(DEVICE, rule, drawn(3)), trained(None, rule, drawn(3)))


def test_ordinary_numbers() -> None:
    """1 - beta2 times g squared rounds as on a GPU, one last bit beside the CPU: few codes move, by one level."""
    grads = [[grad * 1.2345 for grad in of_step] for of_step in drawn(5)]
    rule = AdamW8bit((0.9, 0.999), 1e-8, 0.05)
    found, expected = trained(DEVICE, rule, grads), trained(None, rule, grads)
    for name, tensor in found.state_tensors().items():
        other = expected.state_tensors()[name]
        if tensor.dtype == torch.uint8:
            apart = (tensor.int() - other.int()).abs()
            assert int(apart.max()) <= 1
            assert float(apart.float().mean()) < 1e-3
        else:
            torch.testing.assert_close(tensor, other, rtol=2.5e-7, atol=0)
    for name, parameter in found.parameters.items():
        # A moved code changes the next update: by a level, a small part of the learning rate.
        apart = (parameter - expected.parameters[name]).detach().abs()
        assert float(apart.max()) < 1e-3
        assert float((apart > 1e-6).float().mean()) < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-38, 1e15], ids=str)
def test_the_edges_of_the_numbers(scale: float) -> None:
    """Blocks of zeros, squares that vanish, and gradients of which even the sum is below the smallest normal number."""
    rule = AdamW8bit((0.9, EXACT), 1e-8, 0.05)
    assert_alike(trained(DEVICE, rule, drawn(3, scale)), trained(None, rule, drawn(3, scale)))


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_gradients_without_a_value_are_seen(fault: float) -> None:
    """In the weight, in the block's factors, and nowhere else; as in the plain update."""
    grads = drawn(2)
    grads[1][0][3, 5] = fault
    rule = AdamW8bit((0.9, EXACT), 1e-8)
    found, expected = trained(DEVICE, rule, grads), trained(None, rule, grads)
    weight, place = found.parameters["0"].detach(), (3 * 128 + 5) // BLOCK
    assert weight[3, 5].isnan()
    assert int(weight.isnan().sum()) == 1
    largest = found.state["0"]["exp_avg_largest"]
    assert (~largest.isfinite()).nonzero().flatten().tolist() == [place]
    assert_alike(found, expected)


def test_all_parameters_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small one, with its state in fp32, is updated by torch."""
    grids = []
    launch = kernel._adamw_8bit

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return launch[grid]

    monkeypatch.setattr(kernel, "_adamw_8bit", Recorded())
    trained(DEVICE, AdamW8bit(), drawn(2))
    assert [grid[0] for grid in grids] == [4, 4]


@pytest.mark.parametrize("begin", [1, 3, 255])
@pytest.mark.parametrize("count", [4096, 4097, 5003])
def test_slices_that_begin_anywhere(begin: int, count: int) -> None:
    """As those of a rank: addresses are multiples of 4 bytes only. What lies beside a slice stays."""
    whole, grad = torch.randn(6000), torch.randn(6000).bfloat16().float()
    rule, states = AdamW8bit((0.9, EXACT), 1e-8, 0.05), []
    for device_type in (DEVICE, None):
        copy = whole.clone()
        weight = copy[begin : begin + count]
        state = rule.fresh_state(weight)
        with torch.no_grad(), running_kernels(device_type):
            for _ in range(2):
                rule.update([weight], [grad[begin : begin + count]], [state], 0.1)
        assert torch.equal(copy[:begin], whole[:begin])
        assert torch.equal(copy[begin + count :], whole[begin + count :])
        states.append({**state, "weight": weight})
    found, expected = states
    torch.testing.assert_close(found.pop("weight"), expected.pop("weight"), rtol=2.4e-7, atol=1e-7)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
