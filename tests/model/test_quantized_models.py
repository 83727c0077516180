"""Models with quantised blocks: products against a model that holds the unpacked weights, loading, recomputation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_judges import IDS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.huggingface_weights import HuggingFaceCheckpoint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.errors import CheckpointError
from llamatune.events import ignore_event, never_stop
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.layers import Linear
from llamatune.model.packed_weight import PackedWeight, Scratch, hold_quantized, quantize_blocks
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.transformer import Transformer
from llamatune.shapes.adapter import AdapterSpec

KINDS = pytest.mark.parametrize("kind", list(QUANTIZATIONS))
LEAST_ERROR = {"nf4": 0.02, "float8": 0.005, "int8": 0.001}
"""Of logits, so that something was quantised."""


def quantized_model(kind: str, base: Path, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    checkpoint = open_checkpoint(base)
    source = QuantizedBase(kind, checkpoint, checkpoint.config, torch.device("cpu"), ignore_event, never_stop)
    model = load_model(checkpoint, dtype, quantized=source)
    model.activation_dtype = torch.float32
    return model


def with_adapters(model: Transformer, dropout: float = 0.0) -> Transformer:
    apply_adapter(model, AdapterSpec(4, 8, dropout, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")), seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model.train()


def holding_unpacked(model: Transformer) -> Transformer:
    """The same model with every quantised matrix as an ordinary one in fp32."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, Linear) and module.quantized is not None:
            weight = module.quantized.unpacked(torch.float32).clone()
            module.quantized = None
            module.weight = nn.Parameter(weight, requires_grad=False)
    return dense


def logits_and_gradients(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(IDS)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.roll(-1, 1).flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}
    assert gradients
    return {"logits": logits.detach().clone(), **gradients}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@KINDS
def test_logits_and_gradients_are_those_of_the_unpacked_weights(kind: str, tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(quantized_model(kind, tiny_base()))
    found, expected = logits_and_gradients(model), logits_and_gradients(holding_unpacked(model))
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-5
    plain = with_adapters(load_model(tiny_base(), torch.float32))
    assert distance(logits_and_gradients(plain)["logits"], expected["logits"]) > LEAST_ERROR[kind], (
        "nothing was quantised"
    )


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_they_are_close_to_fp32(kind: str, tiny_base: Callable[..., Path], dtype: torch.dtype) -> None:
    model = with_adapters(quantized_model(kind, tiny_base(), dtype))
    expected = logits_and_gradients(model)
    with torch.autocast("cpu", dtype):
        found = logits_and_gradients(model)
    assert max(distance(found[name], expected[name]) for name in expected) < 0.05
    assert all(gradient.dtype == torch.float32 for name, gradient in found.items() if name != "logits")


@KINDS
@pytest.mark.parametrize("mode", ["block", "sublayer", "every_2"])
def test_recomputation_changes_no_bit(kind: str, tiny_base: Callable[..., Path], mode: str) -> None:
    """Unpacking again in the middle of backward overwrites nothing that is still needed."""
    model = with_adapters(quantized_model(kind, tiny_base()), dropout=0.2)
    again = copy.deepcopy(model)
    apply_activation_checkpointing(again, mode, fused=False)
    results = []
    for each in (model, again):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(logits_and_gradients(each))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@KINDS
def test_autograd_keeps_no_matrix(kind: str, tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(quantized_model(kind, tiny_base()))
    matrices = {tuple(module.quantized.shape) for module in model.modules()
                if isinstance(module, Linear) and module.quantized is not None}  # fmt: skip
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    shared = {room.untyped_storage().data_ptr() for module in model.modules() if hasattr(module, "scratch")
              for room in module.scratch._buffers.values()}  # fmt: skip
    assert len(shared) == 1, "one buffer for all layers"
    assert not [t.shape for t in kept if tuple(t.shape) in matrices or t.untyped_storage().data_ptr() in shared]


@KINDS
def test_inference_before_training_leaves_a_usable_buffer(kind: str, tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(quantized_model(kind, tiny_base()))
    with torch.inference_mode():
        model(IDS)
    logits_and_gradients(model)


@KINDS
def test_a_model_quantised_in_memory_is_the_loaded_one(kind: str, tiny_base: Callable[..., Path]) -> None:
    loaded, made = quantized_model(kind, tiny_base()), load_model(tiny_base(), torch.float32, writable=True)
    quantize_blocks(made, QUANTIZATIONS[kind], torch.bfloat16)
    made.activation_dtype = torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(IDS), made(IDS))
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in made.named_parameters()}


@KINDS
def test_both_formats_and_tied_heads_load(
    kind: str, tiny_base: Callable[..., Path], meta_copy: Callable[..., Path]
) -> None:
    base = tiny_base(tie_word_embeddings=True)
    with torch.no_grad():
        assert torch.equal(quantized_model(kind, base)(IDS), quantized_model(kind, meta_copy(base))(IDS))


@KINDS
def test_loading_holds_one_full_matrix_at_a_time(
    kind: str, tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    read, seen = HuggingFaceCheckpoint.tensor, []

    def watched(self: Checkpoint, name: str, mapped: bool = False) -> Tensor:
        alive = [earlier for earlier, _ in seen if "layers" in earlier and "proj" in earlier and _() is not None]
        assert not alive, f"{alive} still in memory while {name} is read"
        tensor = read(self, name, mapped)
        seen.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(HuggingFaceCheckpoint, "tensor", watched)
    quantized_model(kind, tiny_base(torch.bfloat16))
    assert len(seen) > 20


@KINDS
def test_weights_that_are_not_finite_are_refused_by_name(
    kind: str, tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base(), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.inf
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.up_proj\.weight.*{kind}"):
        quantized_model(kind, tmp_path / "base")


@KINDS
def test_a_step_runs_where_tensors_have_no_values(kind: str, tiny_base: Callable[..., Path]) -> None:
    """Peak memory of a large model is counted under FakeTensorMode; the layout alone must do."""
    config = open_checkpoint(tiny_base()).config
    with FakeTensorMode():
        model, scratch = Transformer(config), Scratch()
        for module in model.model.layers.modules():
            if isinstance(module, Linear) and module.quantized is None:
                shape = (module.out_features, module.in_features)
                held = QUANTIZATIONS[kind].storage(shape).items()
                tensors = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in held}
                hold_quantized(module, QUANTIZATIONS[kind](shape, tensors, scratch))
        apply_adapter(model, AdapterSpec(4, 8, 0.0, ("q_proj", "v_proj")))
        model(torch.zeros(1, 9, dtype=torch.long)).sum().backward()
        assert all(parameter.grad is not None for _, parameter in adapter_parameters(model))


@KINDS
def test_a_matrix_is_unpacked_once_for_the_products_that_follow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked, inner = [], QUANTIZATIONS[kind].unpack_into

    def counted(self: PackedWeight, flat: Tensor) -> None:
        unpacked.append(self)
        inner(self, flat)

    monkeypatch.setattr(QUANTIZATIONS[kind], "unpack_into", counted)
    scratch, generator = Scratch(), torch.Generator().manual_seed(0)
    W, other = (QUANTIZATIONS[kind].quantize(torch.randn(48, 64, generator=generator), scratch) for _ in range(2))
    x, grad = torch.randn(9, 64, generator=generator), torch.randn(9, 48, generator=generator)
    expected = [W.product(x), W.product_back(grad), W.product(x.bfloat16())]
    assert unpacked == [W, W], "once for each dtype"
    other.product(x)
    assert torch.equal(W.product(x), expected[0])
    assert unpacked == [W, W, other, W]
    scratch.buffer(1, torch.float32, x.device).fill_(7.0)
    assert torch.equal(W.product_back(grad), expected[1])
    assert len(unpacked) == 5
    larger = QUANTIZATIONS[kind].quantize(torch.randn(96, 128, generator=generator), scratch)
    larger.product(torch.randn(1, 128))
    assert torch.equal(W.product(x.bfloat16()), expected[2])
