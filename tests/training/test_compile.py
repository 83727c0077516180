"""``training.compile``: the losses of an uncompiled run, one compilation for all lengths, one line where none works.

Models of one shape and dtype share what is compiled, so the C++ compiler works for one of the cases alone; the others
are traced and split into forward and backward as always, but run by ATen.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_tools import StopAfter, assert_same_outcome, losses, make_spec, run_and_record, spec_values

from llamatune.errors import EnvironmentFault, Stopped
from llamatune.events import Notice
from llamatune.model import compiled_functions
from llamatune.model.compiled_functions import compiling, is_compiling
from llamatune.model.nf4 import BLOCK, NF4Weight, dequantize_at_once, pairs_of_levels
from llamatune.model.packed_weight import Scratch
from llamatune.training.compile_ahead import check_compiler
from llamatune.training.train import train

ALL = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"}


QWEN: dict[str, Any] = {"model_type": "qwen3", "attention_bias": True, "head_dim": 10}
BASES = pytest.mark.parametrize("changes", [{}, pytest.param(QWEN, marks=pytest.mark.slow)], ids=["llama", "qwen 3"])


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    try:
        check_compiler(torch.device("cpu"))
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


def graphs() -> int:
    """How many graphs were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.cache(functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled_functions, "_compiled", quick)


CASES: dict[str, dict[str, Any]] = {
    "fused, blocks recomputed": {"lora": ALL, "training__activation_checkpointing": "block"},
    "fused, nf4": {"model__dtype": "nf4"},
    "plain": {"lora": ALL, "training__fused": False},
    "plain, recomputed": {"lora": ALL, "training__fused": False, "training__activation_checkpointing": "sublayer"},
    "every parameter": {"lora": None},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("without_cpp")
def test_every_kind_of_run_has_the_losses_of_an_uncompiled_one(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    compare(tiny_base(), prepared(), tmp_path, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fused, blocks recomputed", "plain"])
@pytest.mark.usefixtures("without_cpp")
def test_biases_and_norms_of_heads(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    compare(tiny_base(**QWEN), prepared(), tmp_path, CASES[case])


def test_the_compilers_own_code_has_the_losses_of_an_uncompiled_run(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    compare(tiny_base(), prepared(), tmp_path, {"lora": ALL})


def compare(base: Path, data: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    changes = {**case, "training__num_epochs": 2}
    train(make_spec(base, data, tmp_path / "eager", **changes))
    _, events = run_and_record(make_spec(base, data, tmp_path / "compiled", **changes, training__compile=True))
    assert any("compiled" in event.message for event in events if isinstance(event, Notice))
    found, expected = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < 0.95 * found[0]
    assert not is_compiling()


@BASES
def test_rows_of_other_lengths_compile_nothing_anew(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    base, data, how = tiny_base(**changes), prepared(), {"lora": ALL, "training__compile": True}
    train(make_spec(base, data, tmp_path / "first", **how))
    before = graphs()
    train(make_spec(base, data, tmp_path / "second", **how, training__seed=5, training__micro_batch_size=4))
    assert graphs() == before > 5


@BASES
def test_a_stopped_run_goes_on_in_the_same_bytes(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    def spec(output: str) -> Any:
        return make_spec(tiny_base(**changes), prepared(), tmp_path / output, lora=ALL, training__compile=True)

    train(spec("whole"))
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec("halves"), on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec("halves"))
    assert_same_outcome(tmp_path / "halves", tmp_path / "whole")


def test_nf4_unpacked_at_once_has_the_same_bits() -> None:
    dtype = torch.bfloat16
    scratch = Scratch()
    weight = NF4Weight.quantize(torch.randn(64, 48), scratch)
    expected = weight.unpacked(dtype).clone()
    found = torch.empty(64 * 48, dtype=dtype)
    pairs = pairs_of_levels(scratch, dtype, found.device).view(dtype)
    with compiling():
        dequantize_at_once(weight.codes.view(-1, BLOCK // 2), weight.scales()[:, None], pairs, found.view(-1, BLOCK))
    assert torch.equal(found.view(64, 48), expected)


def test_without_a_compiler_the_run_ends_in_one_line(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_values(tiny_base(), prepared(), tmp_path / "run", training__compile=True)))
    without = {**os.environ, "CXX": str(tmp_path / "absent"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "llamatune", "train", str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=without, check=False)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("error: torch.compile does not work here (InvalidCxxCompiler")
    assert "Traceback" not in done.stderr
    assert "set it to false" in done.stderr
    assert not (tmp_path / "run").exists()
