"""NF4 against a slow reading of the paper, and products against a model that holds the unpacked weights."""

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
from llamatune.model.blockwise_8bit import dynamic_levels
from llamatune.model.layers import Linear
from llamatune.model.nf4 import LEVELS, NF4Weight
from llamatune.model.packed_weight import Scratch, hold_quantized, quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

SHAPES = [(64, 64), (37, 53), (1, 1), (3, 5), (1, 200), (130, 129), (257, 128), (100, 48)]


def matrix(shape: tuple[int, ...], std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def nearest(value: float, levels: list[float]) -> int:
    return min(range(len(levels)), key=lambda index: abs(value - levels[index]))


def slowly_quantized(W: Tensor) -> tuple[list[int], list[float], Tensor]:
    """Codes, scales as read back, and weights, one number at a time."""
    flat = W.flatten().double().tolist()
    blocks = [flat[begin : begin + 64] for begin in range(0, len(flat), 64)]
    largest = torch.tensor([max(map(abs, block)) for block in blocks], dtype=torch.float32)
    mean = torch.tensor(sum(largest.tolist()) / len(blocks), dtype=torch.float32)
    eight_bit, scales = dynamic_levels(signed=True).tolist(), []
    for group in (largest - mean).split(256):
        factor = group.abs().max()
        for rest in group:
            level = torch.tensor(eight_bit[nearest(float(rest / factor) if factor else 0.0, eight_bit)])
            scales.append(float(level * factor + mean))
    codes, weights = [], []
    for block, scale in zip(blocks, scales, strict=True):
        for weight in block:
            codes.append(nearest(weight, [level * scale for level in LEVELS]))
            weights.append(LEVELS[codes[-1]] * scale)
    return codes, scales, torch.tensor(weights, dtype=torch.float64).view(W.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_and_scale_is_that_of_the_slow_reading(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(shape).to(dtype)
    W.view(-1)[0] *= 30  # an outlier block
    packed = NF4Weight.quantize(W, Scratch())
    codes, scales, weights = slowly_quantized(W)
    found = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: W.numel()]
    torch.testing.assert_close(packed.scales(), torch.tensor(scales), rtol=1e-6, atol=0)
    differing = int((found != torch.tensor(codes)).sum())
    # A 16-bit weight can lie exactly between two levels, up to the last bit of the scale.
    assert differing <= (0 if dtype == torch.float32 else max(1, W.numel() // 500))
    error = (packed.unpacked(torch.float32).double() - W.double()).norm()
    torch.testing.assert_close(error, (weights - W.double()).norm(), rtol=1e-5, atol=1e-9)


def test_the_dynamic_map_is_the_papers() -> None:
    """Seven decades below 1; each level is the middle of a cell, and each decade has twice those of the one below."""
    for signed in (True, False):
        levels = dynamic_levels(signed).tolist()
        assert len(levels) == len(set(levels)) == 256
        assert (0.0 in levels, levels[-1]) == (True, 1.0)
        for decade in range(7):
            low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
            inside = [level for level in levels if low < level < high]
            cells = 2**decade * (1 if signed else 2)
            expected = [low + (high - low) * (2 * cell + 1) / (2 * cells) for cell in range(cells)]
            assert inside == pytest.approx(expected, rel=1e-5)
            negative = sorted(-level for level in levels if -high < level < -low)
            assert negative == (inside if signed else [])


def test_the_error_on_a_normal_matrix_is_the_known_one() -> None:
    """0.0921 of the norm in blocks of 64 with exact scales, by an independent count; the rest is our better choice."""
    W = matrix((1024, 1024))
    blocks = W.view(-1, 64).double()
    largest = blocks.abs().amax(1, keepdim=True)
    distance = (blocks[..., None] / largest[..., None] - torch.tensor(LEVELS).double()).abs().amin(-1) * largest
    exact = float(distance.norm() / blocks.norm())
    assert exact == pytest.approx(0.0921, abs=5e-4)
    found = NF4Weight.quantize(W, Scratch()).unpacked(torch.float32)
    assert float((found - W).norm() / W.norm()) == pytest.approx(exact, rel=5e-3)


def test_it_costs_half_a_byte_and_a_64th_a_weight() -> None:
    packed = NF4Weight.quantize(matrix((512, 1024)), Scratch())
    expected = 0.5 + 1 / 64 + 4 / (64 * 256)
    assert sum(buffer.nbytes for buffer in packed.buffers()) / (512 * 1024) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.516, abs=5e-4)


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_and_empty_blocks_come_back(value: float) -> None:
    W = torch.full((70, 64), value)
    W[5] = 0.0
    torch.testing.assert_close(NF4Weight.quantize(W, Scratch()).unpacked(torch.float32), W, rtol=6e-3, atol=0)


def test_unpacking_is_the_same_in_pieces_and_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = NF4Weight.quantize(matrix((200, 130)), Scratch())
    whole = packed.unpacked(torch.float32).clone()
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        torch.testing.assert_close(packed.unpacked(dtype).float(), whole, rtol=tolerance, atol=1e-7)
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", 256)
    assert torch.equal(packed.unpacked(torch.float32), whole)
    assert torch.equal(NF4Weight.quantize(matrix((200, 130)), Scratch()).unpacked(torch.float32), whole)


# Inside a model.


def nf4_model(base: Path, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    checkpoint = open_checkpoint(base)
    source = QuantizedBase("nf4", checkpoint, checkpoint.config, torch.device("cpu"), ignore_event, never_stop)
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
    """The same model with every NF4 matrix as an ordinary one in fp32."""
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


def test_logits_and_gradients_are_those_of_the_unpacked_weights(tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(nf4_model(tiny_base()))
    found, expected = logits_and_gradients(model), logits_and_gradients(holding_unpacked(model))
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-5
    plain = with_adapters(load_model(tiny_base(), torch.float32))
    assert distance(logits_and_gradients(plain)["logits"], expected["logits"]) > 0.02, "nothing was quantised"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_they_are_close_to_fp32(tiny_base: Callable[..., Path], dtype: torch.dtype) -> None:
    model = with_adapters(nf4_model(tiny_base(), dtype))
    expected = logits_and_gradients(model)
    with torch.autocast("cpu", dtype):
        found = logits_and_gradients(model)
    assert max(distance(found[name], expected[name]) for name in expected) < 0.05
    assert all(gradient.dtype == torch.float32 for name, gradient in found.items() if name != "logits")


@pytest.mark.parametrize("mode", ["block", "sublayer", "every_2"])
def test_recomputation_changes_no_bit(tiny_base: Callable[..., Path], mode: str) -> None:
    """Unpacking again in the middle of backward overwrites nothing that is still needed."""
    model = with_adapters(nf4_model(tiny_base()), dropout=0.2)
    again = copy.deepcopy(model)
    apply_activation_checkpointing(again, mode, fused=False)
    results = []
    for each in (model, again):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(logits_and_gradients(each))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_autograd_keeps_no_matrix(tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(nf4_model(tiny_base()))
    matrices = {tuple(module.quantized.shape) for module in model.modules()
                if isinstance(module, Linear) and module.quantized is not None}  # fmt: skip
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    shared = {room.untyped_storage().data_ptr() for module in model.modules() if hasattr(module, "scratch")
              for room in module.scratch._buffers.values()}  # fmt: skip
    assert len(shared) == 1, "one buffer for all layers"
    assert not [t.shape for t in kept if tuple(t.shape) in matrices or t.untyped_storage().data_ptr() in shared]


def test_inference_before_training_leaves_a_usable_buffer(tiny_base: Callable[..., Path]) -> None:
    model = with_adapters(nf4_model(tiny_base()))
    with torch.inference_mode():
        model(IDS)
    logits_and_gradients(model)


def test_a_model_quantised_in_memory_is_the_loaded_one(tiny_base: Callable[..., Path]) -> None:
    loaded, made = nf4_model(tiny_base()), load_model(tiny_base(), torch.float32, writable=True)
    quantize_blocks(made, NF4Weight, torch.bfloat16)
    made.activation_dtype = torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(IDS), made(IDS))
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in made.named_parameters()}


def test_both_formats_and_tied_heads_load(tiny_base: Callable[..., Path], meta_copy: Callable[..., Path]) -> None:
    base = tiny_base(tie_word_embeddings=True)
    with torch.no_grad():
        assert torch.equal(nf4_model(base)(IDS), nf4_model(meta_copy(base))(IDS))


def test_loading_holds_one_full_matrix_at_a_time(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
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
    nf4_model(tiny_base(torch.bfloat16))
    assert len(seen) > 20


def test_weights_that_are_not_finite_are_refused_by_name(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base(), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.inf
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*nf4"):
        nf4_model(tmp_path / "base")


def test_a_step_runs_where_tensors_have_no_values(tiny_base: Callable[..., Path]) -> None:
    """Peak memory of a large model is counted under FakeTensorMode; the layout alone must do."""
    config = open_checkpoint(tiny_base()).config
    with FakeTensorMode():
        model, scratch = Transformer(config), Scratch()
        for module in model.model.layers.modules():
            if isinstance(module, Linear) and module.quantized is None:
                shape = (module.out_features, module.in_features)
                held = NF4Weight.storage(shape).items()
                tensors = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in held}
                hold_quantized(module, NF4Weight(shape, tensors, scratch))
        apply_adapter(model, AdapterSpec(4, 8, 0.0, ("q_proj", "v_proj")))
        model(torch.zeros(1, 9, dtype=torch.long)).sum().backward()
        assert all(parameter.grad is not None for _, parameter in adapter_parameters(model))
