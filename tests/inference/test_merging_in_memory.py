"""``generate --merge``: the weights that are computed with hold the adapter's update, and no file changes."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions, ModelSource
from llamatune.errors import CheckpointError, Stopped
from llamatune.events import Notice, ignore_event, never_stop
from llamatune.inference import merging_in_memory
from llamatune.inference.model_source import open_model
from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.adapters.merged_layer import merged_layer
from llamatune.model.transformer import Transformer

Command = Callable[..., Any]
GREEDY = ("--prompt", "a red llama", "--prompt", "cold rain falls", "--temperature", 0, "--max-new-tokens", 12)


def loaded(base: Path, adapter: Path, merge: Any = "on", told: Any = ignore_event, **more: Any) -> Transformer:
    opened = open_model(ModelSource(base, adapter, device="cpu", **more), merge=merge)
    return opened.load(told, never_stop).by_prefix[""]


def adapted(model: Transformer) -> list[str]:
    return [path for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)]


def scaled(adapter: Path, factor: float, place: Path) -> Path:
    """The adapter with an update ``factor`` times as large."""
    shutil.copytree(adapter, place)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(tensors, place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=repr)
def test_the_weights_are_those_that_merge_lora_writes(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path, dtype: Any, kind: dict[str, Any]
) -> None:
    """Bit for bit; also where portions of rows are merged one after another."""
    base = tiny_base(getattr(torch, dtype))
    adapter = peft_adapter(base, **kind)
    merge_lora(MergeOptions(base, adapter, tmp_path / "merged"))
    expected = load_model(tmp_path / "merged").state_dict()
    found = loaded(base, adapter, dtype=dtype)
    assert not adapted(found)
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_sum_of_adapters_is_merged_and_rows_in_portions(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamatune.model.adapters import merged_layer as module

    base = tiny_base(torch.bfloat16, attention_bias=True)
    adapters = [peft_adapter(base), peft_adapter(base, targets=["v_proj", "down_proj"], r=3)]
    whole = loaded(base, adapters, weights=(0.7, -0.4))  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", 48 * 7)
    in_portions = loaded(base, adapters, weights=(0.7, -0.4))  # type: ignore[arg-type]
    beside = loaded(base, adapters, "off", weights=(0.7, -0.4))  # type: ignore[arg-type]
    assert len(adapted(beside)) == 21
    plain = dict(whole.named_parameters())
    for name, tensor in in_portions.named_parameters():  # products of few rows may be added in another order
        torch.testing.assert_close(tensor, plain[name], rtol=2**-7, atol=1e-6)
    assert "model.layers.0.self_attn.q_proj.bias" in plain
    layer = beside.get_submodule("model.layers.1.mlp.down_proj")
    A, B = layer.lora_A.double(), layer.lora_B.double()
    exact = layer.weight.double() + layer.scaling * B @ A
    error = (plain["model.layers.1.mlp.down_proj.weight"].double() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert float(error.max()) <= 2**-8


def test_text_is_the_same_and_files_are_untouched(
    command: Command, tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base()
    adapter = peft_adapter(base)

    def digests() -> list[str]:
        files = sorted(path for place in (base, adapter) for path in place.rglob("*") if path.is_file())
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    before, results = digests(), []
    for merge in ("off", "auto", "on"):
        done = command("generate", "--model", base, "--adapter", adapter, *GREEDY, "--merge", merge, "--json")
        assert done.code == 0, done.stderr
        results.append(json.loads(done.stdout)["results"])
    assert results[0] == results[1] == results[2]
    assert digests() == before


def test_auto_merges_on_a_gpu_alone_and_where_nothing_else_needs_the_base(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base()
    source = ModelSource(base, peft_adapter(base), device="cpu")
    opened = open_model(source, merge="auto")
    assert not opened.merges
    on_gpu = replace(opened, device=torch.device("cuda"))
    assert on_gpu.merges
    others: tuple[dict[str, Any], ...] = (
        {"compare": True}, {"quantized": "nf4"}, {"placement": "host"}, {"adapter": None}, {"merge": "off"},
    )  # fmt: skip
    for change in others:
        assert not replace(on_gpu, **change).merges


def test_what_rounding_would_take_stays_beside_unless_merging_is_asked_for(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_base(torch.bfloat16)
    adapter = peft_adapter(base)
    small = scaled(adapter, 1e-3, tmp_path / "small")
    for update, share, dtype in ((adapter, 0.99, "bfloat16"), (small, 0.0, "bfloat16"), (small, 0.99, "float32")):
        layer = loaded(base, update, "off", dtype=dtype).get_submodule("model.layers.0.mlp.up_proj")
        assert isinstance(layer, AdaptedLinear)
        merged, survival = merged_layer(layer)
        delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()  # type: ignore[operator]
        left = merged.weight.double() - layer.weight.double()
        assert survival.share == pytest.approx(float((left * delta).sum() / (delta * delta).sum()), abs=1e-3)
        assert (survival.share >= 0.99) == (share == 0.99)
    model = loaded(base, small, "off")
    merging_in_memory.merge_in_memory(model, False, small, ignore_event, never_stop)
    assert len(adapted(model)) == 21
    model = loaded(base, adapter, "off")
    merging_in_memory.merge_in_memory(model, False, adapter, ignore_event, never_stop)
    assert not adapted(model)
    told = list[Any]()
    assert not adapted(loaded(base, small, told=told.append))
    (warning,) = [event for event in told if isinstance(event, Notice) and "merged weights" in event.message]
    assert warning.kind == "warning"
    assert "rounded to bfloat16" in warning.message
    assert not adapted(loaded(base, adapter, told=told.append))
    assert sum(isinstance(event, Notice) for event in told) == 1


def test_a_sum_that_the_dtype_cannot_hold_is_refused_or_stays_beside(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_base(torch.float16)
    large = scaled(peft_adapter(base, targets=["q_proj"]), 1e6, tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"q_proj.weight would hold NaN or infinity, or does so: .*large: leave"):
        loaded(base, large, dtype="float16")
    model = loaded(base, large, "off", dtype="float16")
    merging_in_memory.merge_in_memory(model, False, large, ignore_event, never_stop)
    assert len(adapted(model)) == 3


def test_a_replaced_weight_is_freed_before_the_next_is_made(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = tiny_base(), list[weakref.ref[Any]]()

    def watched(layer: AdaptedLinear) -> Any:
        assert sum(reference() is not None for reference in seen) <= 1, "the one that is being replaced"
        seen.append(weakref.ref(layer.weight))
        return merged_layer(layer)

    monkeypatch.setattr(merging_in_memory, "merged_layer", watched)
    loaded(base, peft_adapter(base))
    assert len(seen) == 21


def test_merging_stops_between_two_layers(tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]) -> None:
    base = tiny_base()
    adapter, answers = peft_adapter(base), iter([False, False, True])
    model = loaded(base, adapter, "off")
    with pytest.raises(Stopped, match="merging"):
        merging_in_memory.merge_in_memory(model, True, adapter, ignore_event, lambda: next(answers))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--compare",), "--merge on and --compare exclude each other"),
        (("--dtype", "nf4"), "--merge on and --dtype nf4 exclude each other"),
        (("--placement", "host"), "--merge on and --placement host exclude each other"),
        ((), "--merge on needs an adapter"),
    ],
)
def test_merging_that_is_impossible_is_a_usage_error(
    command: Command, tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], words: tuple[str, ...],
    what: str,
) -> None:  # fmt: skip
    base = tiny_base()
    more = ("--adapter", peft_adapter(base), *words) if words else ()
    done = command("generate", "--model", base, *more, "--prompt", "a", "--merge", "on")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {what}")


def test_an_output_is_of_merged_weights_or_of_others(
    command: Command, tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, prompts, output = tiny_base(), tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a red llama\n")
    words = ("generate", "--model", base, "--adapter", peft_adapter(base), "--prompt-file", prompts, "--output", output)
    assert command(*words, "--max-new-tokens", 2).code == 0
    refused = command(*words, "--max-new-tokens", 2, "--merge", "on")
    assert (refused.code, "written with another merged" in refused.stderr) == (5, True), refused.stderr
    assert command(*words, "--max-new-tokens", 2, "--merge", "off").code == 0
