"""Every pair of model.dtype and precision, and what an fp16 overflow does and does not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import (
    StopAfter,
    adapter_tensors,
    assert_same_outcome,
    last_checkpoint,
    losses,
    make_spec,
    metrics,
)
from safetensors.torch import load_file

from llamatune.errors import NumericsError, SpecError, Stopped
from llamatune.events import StepSkipped
from llamatune.training import model_and_optimizer
from llamatune.training import train as train_module
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.precision import LossScaler
from llamatune.training.train import train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    """The learners that runs build, for a look at the model after training."""
    built: list[Learner] = []
    build = train_module.build_learner

    def record(*arguments: Any, **more: Any) -> Learner:
        built.append(build(*arguments, **more))
        return built[-1]

    monkeypatch.setattr(train_module, "build_learner", record)
    return built


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_trains_close_to_fp32_and_leaves_the_base_as_it_was(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    learners: list[Learner],
    dtype: str,
    precision: str,
) -> None:
    def run(name: str, dtype: str, precision: str) -> list[float]:
        spec = make_spec(
            tiny_base(), prepared(), tmp_path / name, training__max_steps=3, model__dtype=dtype,
            training__precision=precision, lora={"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
            training__weight_decay=0.1, training__micro_batch_size=8, training__gradient_accumulation_steps=3,
            training__learning_rate=0.03,
        )  # fmt: skip
        train(spec)
        return losses(tmp_path / name)

    found, expected = run("run", dtype, precision), run("fp32", "float32", "fp32")
    assert found == pytest.approx(expected, rel=0.02)
    assert expected[2] < 0.9 * expected[0], "training that changes nothing would pass too"
    stored = load_file(tiny_base() / "model.safetensors")
    held = dict(learners[0].model.named_parameters())
    assert held.keys() > stored.keys()
    for name, tensor in stored.items():
        assert held[name].dtype == DTYPES[dtype]
        assert torch.equal(held[name], tensor.to(DTYPES[dtype])), f"{name} has moved"
    assert all(tensor.dtype == torch.float32 for tensor in adapter_tensors(tmp_path / "run" / "adapter").values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_parameter_trains_from_fp32_weights(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    spec = make_spec(
        tiny_base(), prepared(), tmp_path / "run", lora=None, training__max_steps=3, training__precision=precision,
        training__learning_rate=1e-3,
    )  # fmt: skip
    train(spec)
    expected = {"fp32": 1e-3}.get(precision, 0.02)
    train(spec.model_copy(update={"training": spec.training.model_copy(
        update={"output_dir": str(tmp_path / "fp32"), "precision": "fp32"})}))  # fmt: skip
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "fp32"), rel=expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_every_parameter_in_16_bits_is_refused_with_the_reason(dtype: str, precision: str) -> None:
    with pytest.raises(SpecError, match=r"loses small updates.*model\.dtype: float32"):
        make_spec(Path("base"), Path("data"), Path("run"), lora=None, model__dtype=dtype, training__precision=precision)


# fp16 overflows.


@pytest.fixture
def scale_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start every loss scaler at another scale."""

    def start(scale: float, growth_interval: int = 2000) -> None:
        monkeypatch.setattr(
            model_and_optimizer, "LossScaler", lambda enabled: LossScaler(enabled, scale, growth_interval)
        )

    return start


FP16 = {
    "training__precision": "fp16", "training__max_steps": 4, "training__lr_scheduler": "linear",
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "data__shuffle": False,
}  # fmt: skip


def test_fp16_without_overflow_is_close_to_fp32(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """The gradient that is clipped and reported is the unscaled one."""
    spec = make_spec(tiny_base(), prepared(), tmp_path / "fp16", **FP16, training__max_grad_norm=0.5)
    train(spec)
    train(make_spec(tiny_base(), prepared(), tmp_path / "fp32", **{**FP16, "training__precision": "fp32"},
                    training__max_grad_norm=0.5))  # fmt: skip
    fp16, fp32 = metrics(tmp_path / "fp16", "step"), metrics(tmp_path / "fp32", "step")
    assert [line["loss_scale"] for line in fp16] == [65536.0] * 4
    assert [line["grad_norm"] for line in fp16] == pytest.approx([line["grad_norm"] for line in fp32], rel=0.02)
    assert [line["loss"] for line in fp16] == pytest.approx([line["loss"] for line in fp32], rel=5e-3)


def test_an_overflow_skips_the_update_and_does_not_move_the_schedule(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    scale_of: Callable[..., None],
    learners: list[Learner],
) -> None:
    scale_of(2.0**40)
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **FP16)
    trained: list[dict[str, torch.Tensor]] = []

    def on_event(event: object) -> None:
        if isinstance(event, StepSkipped):
            trained.append({name: p.detach().clone() for name, p in learners[0].parameters.items()})
            assert not learners[0].optimizer.state

    summary = train(spec, on_event=on_event)
    lines = [line for line in metrics(tmp_path / "run") if line["event"] != "epoch"]
    skipped, steps = [[line for line in lines if line["event"] == kind] for kind in ("skipped", "step")]
    assert len(skipped) >= 10
    assert all(torch.equal(weights[name], trained[0][name]) for weights in trained for name in weights)
    assert not any(tensor.any() for name, tensor in trained[-1].items() if "lora_B" in name)
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (39 - i) for i in range(len(skipped))]
    assert all(line.keys() == {"event", "window", "loss_scale"} for line in skipped)
    assert [line["window"] for line in lines] == list(range(1, len(lines) + 1)), "a window was consumed twice or never"
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert steps[0]["loss_scale"] == skipped[-1]["loss_scale"]
    assert summary["steps"] == 4
    assert summary["skipped_windows"] == len(skipped)


def test_epochs_end_by_window_even_where_updates_were_skipped(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, scale_of: Callable[..., None]
) -> None:
    scale_of(2.0**40)
    changes = {**FP16, "training__max_steps": None, "training__num_epochs": 6}
    summary = train(make_spec(tiny_base(), prepared(), tmp_path / "run", **changes))
    windows = [line for line in metrics(tmp_path / "run") if line["event"] in ("step", "skipped")]
    assert len(windows) == 6 * 4
    assert summary["steps"] == 24 - summary["skipped_windows"] > 0


def test_a_run_that_made_no_update_at_all_is_no_success(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, scale_of: Callable[..., None]
) -> None:
    """Every window overflowed: an adapter that was never trained must not pass for a result."""
    scale_of(2.0**60)
    changes = {**FP16, "training__max_steps": None, "training__num_epochs": 1}
    with pytest.raises(NumericsError):
        train(make_spec(tiny_base(), prepared(), tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_resumed_run_goes_on_with_the_scale_it_had(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, scale_of: Callable[..., None]
) -> None:
    scale_of(2.0**31, growth_interval=2)
    whole, parts = (make_spec(tiny_base(), prepared(), tmp_path / name, **FP16) for name in ("whole", "parts"))
    train(whole)
    stop = StopAfter(3)
    with pytest.raises(Stopped):
        train(parts, on_event=stop.on_event, should_stop=stop.should_stop)
    state = json.loads((last_checkpoint(tmp_path / "parts") / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**28
    assert state["position"]["step"] == 0
    assert state["position"]["window"] == 3
    scale_of(2.0**17, growth_interval=2)  # a run that forgot its scale would start here
    train(parts)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    assert len({line["loss_scale"] for line in metrics(tmp_path / "parts", "step")}) > 1, "the scale never grew"


def test_a_gradient_that_overflows_at_any_scale_ends_the_run(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite gradients of a finite loss, planted in the backward pass of the first value projection."""
    build = train_module.build_learner

    def poisoned(*arguments: Any, **more: Any) -> Learner:
        learner = build(*arguments, **more)
        learner.parameters["model.layers.0.self_attn.v_proj.lora_B.weight"].register_hook(lambda g: g * float("inf"))
        return learner

    monkeypatch.setattr(train_module, "build_learner", poisoned)
    with pytest.raises(NumericsError, match="at any loss scale") as raised:
        train(make_spec(tiny_base(), prepared(), tmp_path / "run", **{**FP16, "training__max_steps": 99}))
    assert raised.value.exit_code == 6
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_gradient_that_is_not_finite_ends_a_run_in_fp32_at_once(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, learners: list[Learner], name: str
) -> None:
    def on_event(event: object) -> None:
        if type(event).__name__ == "RunStarted":
            parameter = learners[0].parameters[f"model.layers.2.self_attn.q_proj.{name}.weight"]
            parameter.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(NumericsError, match="gradient is not finite at step 1"):
        train(make_spec(tiny_base(), prepared(), tmp_path / "run"), on_event=on_event)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in learners[0].parameters.values())
    assert not metrics(tmp_path / "run", "step")
