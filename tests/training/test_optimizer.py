"""Optimizers beside torch.optim's, bit for bit; the loss scaler beside torch's GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamatune.errors import CheckpointError
from llamatune.formats.state_json import Scaler
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import SGD, AdamW, Optimizer
from llamatune.training.precision import LossScaler

SHAPES = {"matrix": (33, 20), "tall": (129, 16), "vector": (7,), "scalar": ()}
RATES = [0.01, 0.03, 0.02, 0.05, 0.01, 0.04]


@dataclass(frozen=True)
class Case:
    rule: AdamW | SGD
    judge: Callable[[list[nn.Parameter]], torch.optim.Optimizer]


CASES = {
    "adamw": Case(AdamW(), lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=True)),
    "adamw, every value": Case(
        AdamW((0.8, 0.95), 1e-4, 0.3),
        lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3, fused=True),
    ),
    "sgd": Case(SGD(), lambda p: torch.optim.SGD(p, foreach=True)),
    "sgd, decay": Case(SGD(weight_decay=0.2), lambda p: torch.optim.SGD(p, weight_decay=0.2, foreach=True)),
    "sgd, momentum": Case(SGD(0.9), lambda p: torch.optim.SGD(p, momentum=0.9, foreach=True)),
    "sgd, every value": Case(
        SGD(0.7, True, 0.1),
        lambda p: torch.optim.SGD(p, momentum=0.7, nesterov=True, weight_decay=0.1, foreach=True),
    ),
}


def problem(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int, without: str | None = None) -> None:
    """Of sizes that differ by a factor of ten from step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in parameters.items():
        drawn = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 3 - 1)
        parameter.grad = None if name == without else drawn.to(parameter.dtype)


def judged_update(judge: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in judge.param_groups:
        group["lr"] = learning_rate
    judge.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_every_update_is_torchs_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """At rates that change, and with a tensor that gets no gradient once: it must not even decay."""
    found, expected = problem(dtype), problem(dtype)
    optimizer, judge = Optimizer(found, CASES[name].rule), CASES[name].judge(list(expected.values()))
    for step, rate in enumerate(RATES):
        before = found["tall"].detach().clone()
        for parameters in (found, expected):
            set_gradients(parameters, step, without="tall" if step == 3 else None)
        optimizer.step(rate)
        judged_update(judge, rate)
        for key in SHAPES:
            assert torch.equal(found[key], expected[key]), f"{key} at step {step}"
        assert torch.equal(found["tall"], before) == (step == 3)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in found.values())
    optimizer.step(1.0)
    assert all(torch.equal(found[key], expected[key]) for key in SHAPES)


def tensors_of(judge: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What torch's optimizer remembers under the names of a checkpoint."""
    names = list(SHAPES)
    state = judge.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, held in state.items() for key, value in held.items() if value is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_state_has_torchs_names_and_is_taken_back_from_them(name: str) -> None:
    """A checkpoint that was written with torch's own optimizer goes on bit for bit."""
    expected = problem(torch.float32)
    judge = CASES[name].judge(list(expected.values()))
    for step in range(3):
        set_gradients(expected, step)
        judged_update(judge, RATES[step])
    found = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in expected.items()}
    optimizer, written = Optimizer(found, CASES[name].rule), tensors_of(judge)
    optimizer.restore(written, Path("checkpoint"))
    for step in range(3, 6):
        for parameters in (found, expected):
            set_gradients(parameters, step)
        optimizer.step(RATES[step])
        judged_update(judge, RATES[step])
    ours, theirs = optimizer.state_tensors(), tensors_of(judge)
    assert list(ours) == list(theirs)
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(torch.equal(found[key], expected[key]) for key in SHAPES)
    assert not any(tensor.data_ptr() == written[key].data_ptr() for key, tensor in ours.items()), "taken, not copied"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: {**t, "other/step": t["vector/step"]}, "unknown parameter other"),
        (lambda t: {key: value for key, value in t.items() if key != "vector/exp_avg"}, "of vector is another"),
        (lambda t: {**t, "vector/exp_avg": t["vector/exp_avg"][:3]}, "of vector is another"),
        (lambda t: {**t, "vector/exp_avg": t["vector/exp_avg"].to(torch.uint8)}, "of vector is another"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    parameters = problem(torch.float32)
    optimizer = Optimizer(parameters, AdamW())
    set_gradients(parameters, 0)
    optimizer.step(0.1)
    with pytest.raises(CheckpointError, match=reason) as raised:
        Optimizer(parameters, AdamW()).restore(spoil(optimizer.state_tensors()), Path("checkpoint"))
    assert "checkpoint" in str(raised.value)


def test_the_loss_scale_is_torchs_after_every_update_and_overflow() -> None:
    judge = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    scaler = LossScaler(True, 2.0**20, 3)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]:
        judge.scale(weight.sum() * (float("inf") if overflow else 1.0)).backward()
        ours = [weight.grad.clone() if weight.grad is not None else torch.empty(0)]
        scaler.unscale(ours)
        judge.unscale_(optimizer)
        assert weight.grad is not None
        assert torch.equal(ours[0], weight.grad)
        judge.update()
        (scaler.back_off if overflow else scaler.grow)()
        optimizer.zero_grad()
        assert scaler.state() == judge.state_dict()
        again = LossScaler(True)
        again.restore(Scaler.model_validate(judge.state_dict()))
        assert again.state() == scaler.state()
    assert LossScaler(True).state() == torch.amp.GradScaler("cpu").state_dict()


def test_outside_fp16_the_scale_stays_one() -> None:
    scaler = LossScaler(False)
    for _ in range(2001):
        scaler.grow()
    assert (scaler.scale, scaler.state()) == (1.0, {})


@pytest.mark.parametrize("rule", [AdamW, SGD, AdamW8bit])
def test_a_ratio_multiplies_the_rate_and_the_decay_of_its_parameters(rule: Any) -> None:
    """LoRA+: the same bytes as two optimizers, each at a rate of its own."""
    generator = torch.Generator().manual_seed(8)
    starts = {name: torch.randn(5000, generator=generator) for name in ("lora_A", "lora_B", "other")}
    made = {"momentum": 0.9} if rule is SGD else {}
    ratios = {"lora_B": 16.0}
    together = {name: torch.nn.Parameter(start.clone()) for name, start in starts.items()}
    apart = {name: torch.nn.Parameter(start.clone()) for name, start in starts.items()}
    one = Optimizer(together, rule(weight_decay=0.1, **made), ratios)
    several = {name: Optimizer({name: apart[name]}, rule(weight_decay=0.1, **made)) for name in starts}
    for _ in range(3):
        for name in starts:
            together[name].grad = torch.randn(5000, generator=generator)
            apart[name].grad = together[name].grad.clone()
        one.step(1e-3)
        for name, optimizer in several.items():
            optimizer.step(1e-3 * ratios.get(name, 1.0))
    assert all(torch.equal(together[name], apart[name]) for name in starts)
