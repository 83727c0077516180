"""training.precision: tf32: the products of a run, restored after it; where it is refused; what is as in fp32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_tools import make_spec

from llamatune import devices
from llamatune.errors import EnvironmentFault
from llamatune.events import ignore_event
from llamatune.memory.sizes import Rows, Sizes
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import build_spec
from llamatune.training import precision as precision_module
from llamatune.training.precision import autocast_factory, check_precision, fp32_products, residual_dtype
from llamatune.training.train import plan_training, train

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


def settings() -> tuple[str, str]:
    """Of products on a GPU and on the host."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def test_products_are_in_tf32_within_the_block_alone_and_without_a_warning() -> None:
    before = settings()
    with warnings.catch_warnings(action="error"):
        with fp32_products("tf32"):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert torch.get_float32_matmul_precision() == "high", "what torch.compile reads"
            assert torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        for precision in ("fp32", "bf16", "fp16"):
            with fp32_products(precision):
                assert settings() == before
    assert settings() == before


@pytest.mark.parametrize("interface", ["older", "newer"])
def test_the_callers_precision_of_products_comes_back(interface: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = settings()
    try:
        if interface == "older":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        chosen = settings()
        with pytest.raises(ZeroDivisionError), fp32_products("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
            raise ZeroDivisionError
        assert settings() == chosen
        if interface == "older":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert settings() == before


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, "a CPU has no TF32"),
        ((7, 0), "Tesla has no TF32"),
        ((7, 5), "Tesla has no TF32"),
        ((8, 0), ""),
        ((12, 0), ""),
    ],
)
def test_tf32_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, expected: str
) -> None:
    monkeypatch.setattr(devices, "capability_of", lambda device: capability)
    monkeypatch.setattr(precision_module, "capability_of", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    values = {"model": {"path": "x", "dtype": "float32"}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "precision": "tf32"}}, "test")
    device = CPU if capability is None else GPU
    if not expected:
        check_precision(spec, device, ignore_event)
        return
    with pytest.raises(EnvironmentFault, match=rf"^{expected}: training\.precision: set it to fp32( or fp16)?$"):
        check_precision(spec, device, ignore_event)


def test_a_cpu_refuses_tf32_before_anything_is_written(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", training__precision="tf32")
    for verb in (train, plan_training):
        with pytest.raises(EnvironmentFault, match="a CPU has no TF32"):
            verb(spec)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "nf4"])
@pytest.mark.parametrize("cuda", [(8, 0), (9, 0)])
def test_all_but_the_products_is_as_in_fp32(dtype: str, cuda: tuple[int, int]) -> None:
    values = {"model": {"path": "x", "dtype": dtype}, "lora": {}, "data": {"train": "x"}}
    config, rows = LlamaConfig(48, 100, 3, 6, 2, 131), Rows((17, 9), 20)
    sizes = []
    for precision in ("fp32", "tf32"):
        spec = build_spec({**values, "training": {"output_dir": "x", "precision": precision}}, "test")
        known = vars(Sizes(spec, config, rows, cuda))
        sizes.append({name: value for name, value in known.items() if name != "spec"})
    assert sizes[0] == sizes[1]
    held = torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)
    assert residual_dtype(held, "tf32") == residual_dtype(held, "fp32") == torch.float32
    assert autocast_factory("tf32", GPU) is autocast_factory("fp32", GPU)
