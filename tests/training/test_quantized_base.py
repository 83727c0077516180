"""Runs on a quantised base, NF4 or float8: close to fp32, cached, merged, refused where it makes no sense."""

from __future__ import annotations

import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_tools import adapter_tensors, files, losses, make_spec, run_and_record, spec_values
from safetensors.torch import load_file

from llamatune.checkpoints import quantized_base
from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import HeldDtype, MergeOptions
from llamatune.errors import EnvironmentFault, SpecError, Stopped
from llamatune.events import Notice, Progress
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.spec_sections import ModelSection
from llamatune.training import train as train_module
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.train import train

STEPS = {"training__max_steps": 4, "training__learning_rate": 0.03}


@pytest.fixture(params=list(QUANTIZATIONS))
def quantized(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a short run on a base of one kind."""
    return {"model__dtype": request.param, **STEPS}


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    built: list[Learner] = []
    build = train_module.build_learner
    monkeypatch.setattr(train_module, "build_learner", lambda *a, **b: built.append(build(*a, **b)) or built[-1])
    return built


@pytest.mark.parametrize(
    ("precision", "held", "residual"),
    [
        ("fp32", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
    ],
)
def test_every_precision_trains_close_to_fp32_and_leaves_the_base_as_it_was(
    quantized: dict[str, Any],
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    learners: list[Learner],
    precision: str,
    held: torch.dtype,
    residual: torch.dtype,
) -> None:
    changes = {**quantized, "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
               "training__micro_batch_size": 8}  # fmt: skip
    train(make_spec(tiny_base(), prepared(), tmp_path / "quantised", **changes, training__precision=precision))
    train(make_spec(tiny_base(), prepared(), tmp_path / "fp32", **{**changes, "model__dtype": "float32"}))
    found, expected = losses(tmp_path / "quantised"), losses(tmp_path / "fp32")
    assert found == pytest.approx(expected, rel=0.1)
    assert expected[-1] < 0.9 * expected[0]
    model = learners[0].model
    assert model.activation_dtype == residual
    stored, kept = load_file(tiny_base() / "model.safetensors"), dict(model.named_parameters())
    assert {name for name in stored if name not in kept} == {name for name in stored if "proj" in name}
    assert all(torch.equal(kept[name], tensor.to(held)) for name, tensor in stored.items() if name in kept)
    assert all(tensor.dtype == torch.float32 for tensor in adapter_tensors(tmp_path / "quantised" / "adapter").values())


def test_an_adapter_trained_on_it_merges_into_the_original_base(
    quantized: dict[str, Any], tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    train(make_spec(tiny_base(), prepared(), tmp_path / "run", **quantized))
    merge_lora(MergeOptions(tiny_base(), tmp_path / "run" / "adapter", tmp_path / "merged"))
    merged, base = load_model(tmp_path / "merged"), load_model(tiny_base())
    name = "model.layers.1.self_attn.q_proj"
    tensors = adapter_tensors(tmp_path / "run" / "adapter")
    A, B = (next(t for key, t in tensors.items() if f"{name}.{part}" in key) for part in ("lora_A", "lora_B"))
    expected = base.get_submodule(name).weight + 2 * B @ A
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    assert B.any()


def test_random_weights_are_quantised_too(
    quantized: dict[str, Any],
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    learners: list[Learner],
) -> None:
    train(make_spec(tiny_base(), prepared(), tmp_path / "run", **quantized, model__init="random"))
    assert not [name for name, _ in learners[0].model.named_parameters() if name.endswith("proj.weight")]


def test_the_command_line_takes_it(
    quantized: dict[str, Any],
    command: Callable[..., Any],
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
) -> None:
    values = spec_values(tiny_base(), prepared(), tmp_path / "run", **quantized, training__optimizer="adamw_8bit")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    done = command("train", tmp_path / "spec.yaml", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4


# The cache.


@pytest.fixture
def cached(
    quantized: dict[str, Any], tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> Callable[..., list[str]]:
    """Run with a cache under ``tmp_path``; the warnings, and 'quantising' where it was made."""

    def run(name: str, base: Path | None = None, **changes: Any) -> list[str]:
        changes = {**quantized, "model__quantized_cache": str(tmp_path / "cache"), **changes}
        _, events = run_and_record(make_spec(base or tiny_base(), prepared(), tmp_path / name, **changes))
        warnings = [e.message for e in events if isinstance(e, Notice) and e.kind == "warning"]
        made = [e.task for e in events if isinstance(e, Progress) and e.task == "quantising"]
        return warnings + made[:1]

    return run


def test_with_the_cache_and_without_it_every_byte_is_the_same(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    assert cached("made") == ["quantising"]
    before = files(tmp_path / "cache")
    assert cached("read") == []
    assert files(tmp_path / "cache") == before
    assert cached("without", model__quantized_cache=None) == []
    adapters = [files(tmp_path / name / "adapter") for name in ("made", "read", "without")]
    assert adapters[0] == adapters[1] == adapters[2]


def test_another_base_has_another_entry(
    cached: Callable[..., list[str]], tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    cached("one")
    assert cached("other", tiny_base(intermediate_size=112)) == ["quantising"]
    assert cached("shorter", model__num_layers=2) == ["quantising"]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert cached("again") == []


@pytest.mark.parametrize("victim", ["weights", "manifest"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "flipped"])
def test_a_damaged_entry_is_made_again(
    cached: Callable[..., list[str]], tmp_path: Path, victim: str, cut: bool
) -> None:
    cached("one")
    (entry,) = (tmp_path / "cache").iterdir()
    (weights,) = entry.glob("*.safetensors")
    damaged = weights if victim == "weights" else entry / "llamatune.json"
    before, content = files(entry), bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x40
    damaged.write_bytes(content[: len(content) // 2] if cut else content)
    warning, made = cached("two")
    assert "made again" in warning
    assert made == "quantising"
    assert files(entry) == before
    assert files(tmp_path / "one" / "adapter") == files(tmp_path / "two" / "adapter")


def test_what_is_not_ours_is_not_overwritten(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    cached("one")
    (entry,) = (tmp_path / "cache").iterdir()
    for file in entry.iterdir():
        file.unlink()
    (entry / "thesis.txt").write_text("mine")
    with pytest.raises(EnvironmentFault, match="holds something else"):
        cached("two")
    assert files(entry) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_entry_that_another_process_makes_at_the_same_time_is_read(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ours: bool
) -> None:
    cached("one")
    (entry,) = (tmp_path / "cache").iterdir()
    theirs = entry.rename(tmp_path / "theirs")
    stream = quantized_base.stream_tensors

    def slowly(*given: Any) -> None:
        stream(*given)
        if is_ours:
            shutil.copytree(theirs, entry)
        else:
            entry.mkdir()
            (entry / "thesis.txt").write_text("mine")

    monkeypatch.setattr(quantized_base, "stream_tensors", slowly)
    if is_ours:
        assert cached("two") == ["quantising"]
        assert files(tmp_path / "one" / "adapter") == files(tmp_path / "two" / "adapter")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]
    else:
        with pytest.raises(EnvironmentFault, match="holds something else"):
            cached("two")


def test_stopped_while_quantising_nothing_is_left_behind(
    quantized: dict[str, Any], tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[object] = []
    changes = {**quantized, "model__quantized_cache": str(tmp_path / "cache")}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **changes)

    def stop() -> bool:
        return any(isinstance(event, Progress) and event.task == "quantising" for event in seen)

    with pytest.raises(Stopped):
        train(spec, on_event=seen.append, should_stop=stop)
    assert not list((tmp_path / "cache").iterdir())
    train(spec)


# Refusals.


@pytest.mark.parametrize("dtype", list(QUANTIZATIONS))
def test_it_is_for_frozen_weights_alone(dtype: str) -> None:
    with pytest.raises(SpecError, match=rf"{dtype} weights are frozen.*lora section"):
        make_spec(Path("base"), Path("data"), Path("run"), lora=None, model__dtype=dtype)


def test_every_kind_can_be_asked_for() -> None:
    assert tuple(QUANTIZATIONS) == QUANTIZED_DTYPES
    assert set(QUANTIZED_DTYPES) < set(typing.get_args(ModelSection.model_fields["dtype"].annotation))
    assert set(QUANTIZED_DTYPES) < set(typing.get_args(HeldDtype))


@pytest.mark.parametrize("changes", [{"model__dtype": "bfloat16"}, {"model__dtype": "nf4", "model__init": "random"}])
def test_a_cache_without_use_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=r"model\.quantized_cache"):
        make_spec(Path("base"), Path("data"), Path("run"), **changes, model__quantized_cache="cache")
