"""training.deterministic, with TF32 beside it: what is set during a run, restored after it, and refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import StopAfter, assert_same_outcome, make_spec

from llamatune.benchmarking import measure_cell
from llamatune.devices import choose_device
from llamatune.errors import EnvironmentFault, SpecError, Stopped
from llamatune.events import Event, StepDone, ignore_event
from llamatune.strict_json import read_json
from llamatune.training import inputs as inputs_module
from llamatune.training import train as train_module
from llamatune.training.determinism import cublas_workspace, deterministic_kernels
from llamatune.training.inputs import open_inputs
from llamatune.training.train import train

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")


def settings() -> dict[str, Any]:
    """All that a run may set and must restore."""
    matmul, host = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filling": torch.utils.deterministic.fill_uninitialized_memory,
        "fp32": (matmul.fp32_precision, host.fp32_precision, matmul.fp32_precision == "tf32"),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the shell is in the way."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run sets for a GPU is set though it computes on the CPU."""
    kernels = deterministic_kernels
    for module in (train_module, measure_cell):
        monkeypatch.setattr(module, "deterministic_kernels", lambda wanted, device: kernels(wanted, GPU))
    monkeypatch.setattr(inputs_module, "check_precision", lambda *arguments: None)


def refused_operation() -> None:
    """One that torch has no deterministic kernel for, on a CPU neither."""
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def test_kernels_are_deterministic_within_the_block_alone() -> None:
    before = settings()
    refused_operation()
    with deterministic_kernels(True, GPU):
        inside = settings()
    assert inside == {
        **before, "deterministic": True, "warn only": False, "filling": False,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1",
    }  # fmt: skip
    assert settings() == before


@pytest.mark.parametrize(("wanted", "device"), [(True, CPU), (False, GPU), (False, CPU)], ids=str)
def test_nothing_is_set_on_a_cpu_or_where_it_is_not_wanted(wanted: bool, device: torch.device) -> None:
    before = settings()
    with deterministic_kernels(wanted, device):
        assert settings() == before
        refused_operation()


def test_the_settings_of_the_caller_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(ZeroDivisionError), deterministic_kernels(True, GPU):
            assert settings()["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
            assert not settings()["warn only"]
            raise ZeroDivisionError
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [":0:0", ""])
def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    with deterministic_kernels(True, CPU):
        pass
    before = settings()
    with (
        pytest.raises(EnvironmentFault, match=r"CUBLAS_WORKSPACE_CONFIG is '.*cuda:1: unset it, set it to :4096:8, or"),
        deterministic_kernels(True, GPU),
    ):
        pass
    assert settings() == before


def test_what_torch_refuses_is_one_line_with_the_remedy() -> None:
    with (
        pytest.raises(
            EnvironmentFault, match=r"no deterministic put_: cuda:1: .*training\.deterministic: false"
        ) as told,
        deterministic_kernels(True, GPU),
    ):
        refused_operation()
    assert "\n" not in str(told.value)
    products = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment "
        "variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
        "CUBLAS_WORKSPACE_CONFIG=:16:8."
    )
    with (
        pytest.raises(EnvironmentFault, match=r"^cuBLAS was started without CUBLAS_WORKSPACE_CONFIG.*:4096:8 before"),
        deterministic_kernels(True, GPU),
    ):
        raise RuntimeError(products)
    with pytest.raises(RuntimeError, match="shape"), deterministic_kernels(True, GPU):
        raise RuntimeError("shape mismatch")


def test_cuda_starts_with_the_workspace(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def choose(*arguments: Any) -> torch.device:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return choose_device(*arguments)

    monkeypatch.setattr(inputs_module, "choose_device", choose)
    for deterministic in (True, False):
        train(make_spec(tiny_base(), prepared(), tmp_path / str(deterministic), training__deterministic=deterministic))
    assert seen == [":4096:8", None]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with cublas_workspace(False):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_cpu_computes_the_same_bytes_with_and_without(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("with", "without"):
        train(make_spec(tiny_base(), prepared(), tmp_path / name, training__deterministic=name == "with"))
    assert_same_outcome(tmp_path / "with", tmp_path / "without", cards=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lora", [{"r": 4, "target_modules": "all-linear"}, None], ids=["lora", "full"])
def test_a_whole_run_is_computed_by_deterministic_kernels(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    pretended_gpu: None,
    lora: dict[str, Any] | None,
    fused: bool,
) -> None:
    """And none of its operations, where they are the same on a CPU, is refused."""
    seen: list[dict[str, Any]] = []
    before = settings()

    def observe(event: Event) -> None:
        if isinstance(event, StepDone):
            seen.append(settings())

    how = {"training__deterministic": True, "training__fused": fused, "lora": lora}
    data = prepared(validation_fraction=0.2)
    train(make_spec(tiny_base(), data, tmp_path / "run", training__precision="tf32", **how), on_event=observe)
    assert seen
    assert all(now["deterministic"] and now["fp32"][0] == "tf32" for now in seen)
    assert settings() == before


def test_a_cell_of_the_benchmark_computes_as_a_run_does(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    pretended_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []
    update, build, drawn_on = measure_cell.make_update, measure_cell.build_learner, []

    def observed(*arguments: Any, **more: Any) -> Any:
        seen.append(settings())
        return update(*arguments, **more)

    def built(*arguments: Any, **more: Any) -> Any:
        drawn_on.append(more["drawn_on"])
        return build(*arguments, **more)

    monkeypatch.setattr(measure_cell, "make_update", observed)
    monkeypatch.setattr(measure_cell, "build_learner", built)
    how = {"training__deterministic": True, "training__precision": "tf32", "model__init": "random"}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **how)
    inputs = open_inputs(spec, False, ignore_event)
    assert measure_cell.measure(measure_cell.Task(spec, 1, (0,), None), inputs)["steps"] == 1
    assert all(now["deterministic"] and now["fp32"][0] == "tf32" for now in seen)
    assert drawn_on == [inputs.device]
    assert not settings()["deterministic"]


@pytest.mark.parametrize("field", ["training.deterministic", "training.precision"])
def test_neither_changes_between_two_starts_unless_it_is_allowed(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, pretended_gpu: None, field: str
) -> None:
    """Both change bits. The change of a run that was deterministic to one that is not is on record."""
    run, stop = tmp_path / "run", StopAfter(2)
    first = {"training.deterministic": True, "training.precision": "fp32"}[field]
    second = {"training.deterministic": False, "training.precision": "tf32"}[field]
    key = field.replace(".", "__")
    with pytest.raises(Stopped):
        train(
            make_spec(tiny_base(), prepared(), run, **{key: first}),
            on_event=stop.on_event,
            should_stop=stop.should_stop,
        )
    changed = make_spec(tiny_base(), prepared(), run, **{key: second})
    with pytest.raises(SpecError, match=rf"{field}: {first} -> {second}"):
        train(changed)
    train(changed, allowed_changes=(field,))
    assert read_json(run / "origin.json")["spec_changes"] == [{"field": field, "old": first, "new": second}]


def test_a_spec_of_an_earlier_version_is_one_without(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    run, stop = tmp_path / "run", StopAfter(2)
    spec = make_spec(tiny_base(), prepared(), run)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    lines = (run / "spec.yaml").read_text().splitlines(keepends=True)
    (run / "spec.yaml").write_text("".join(line for line in lines if "deterministic" not in line))
    assert train(spec)["steps"] == 4
