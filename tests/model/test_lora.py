"""LoRA against PEFT: reading its adapters, writing ours, the start, and merging."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_judges import IDS, adapted, reference_logits

from llamatune.checkpoints.adapter import load_adapter, write_adapter
from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import SpecError
from llamatune.formats.manifest import build_directory
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.adapters.lora import LoRALinear
from llamatune.shapes.adapter import AdapterSpec

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EitherFormat = Callable[[Path], Path]


@pytest.mark.parametrize(
    ("targets", "more"),
    [(SEVEN, {}), (["q_proj", "v_proj"], {}), (["o_proj", "down_proj"], {}), (SEVEN, {"use_rslora": True})],
    ids=["seven", "qv", "od", "rank-stabilised"],
)
def test_an_adapter_of_peft_gives_the_logits_of_peft(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    either_format: EitherFormat,
    targets: list[str],
    more: dict[str, object],
) -> None:
    base = tiny_base()
    adapter = peft_adapter(base, targets, **more)
    reference = reference_logits(base, adapter=adapter)
    with torch.no_grad():
        ours = adapted(either_format(base), adapter)(IDS)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
    assert (reference - reference_logits(base)).abs().max() > 0.1


def test_our_adapter_opens_in_peft_with_the_same_logits(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_base(tie_word_embeddings=True)
    adapter = peft_adapter(base)
    with build_directory(tmp_path / "ours", "adapter", {}) as staging:
        write_adapter(staging, load_adapter(adapter))
    with torch.no_grad():
        ours = adapted(base, tmp_path / "ours")(IDS)
    torch.testing.assert_close(ours, reference_logits(base, adapter=tmp_path / "ours"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("output_format", ["hf", "meta"])
def test_merged_is_unmerged(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    either_format: EitherFormat,
    tmp_path: Path,
    output_format: str,
    changes: dict[str, object],
) -> None:
    base = tiny_base(**changes)
    adapter, model = peft_adapter(base, scale=0.05), either_format(base)
    merge_lora(MergeOptions(model, adapter, tmp_path / "merged", format=output_format))  # type: ignore[arg-type]
    with torch.no_grad():
        merged, unmerged = load_model(tmp_path / "merged")(IDS), adapted(model, adapter)(IDS)
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, reference_logits(base, adapter=adapter), atol=1e-4, rtol=0)


def test_merging_rounds_once_from_fp32() -> None:
    W, A, B = torch.randn(37, 53).bfloat16(), torch.randn(3, 53).bfloat16(), torch.randn(37, 3).bfloat16()
    merged = LoRALinear.merged(W, (A, B), 0.37)
    expected = W.double() + 0.37 * (B.double() @ A.double())
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_starts_kaiming_uniform_and_b_at_zero_both_in_fp32(
    tiny_base: Callable[..., Path], dtype: torch.dtype
) -> None:
    model = load_model(tiny_base(), dtype)
    apply_adapter(model, AdapterSpec(40, 8, 0.1, tuple(SEVEN)), seed=1)
    parameters = dict(adapter_parameters(model))
    assert len(parameters) == 2 * 7 * 3
    for name, trained in parameters.items():
        assert trained.dtype == torch.float32
        assert trained.requires_grad
        parameter = trained.detach()
        if ".lora_B." in name:
            assert not parameter.any()
            continue
        assert parameter.shape[0] == 40
        # Kaiming-uniform with a = sqrt(5): gain sqrt(2 / (1 + 5)), bound gain * sqrt(3 / fan_in).
        bound = math.sqrt(2 / (1 + 5)) * math.sqrt(3 / parameter.shape[1])
        assert 0.97 * bound < float(parameter.abs().max()) <= bound
        assert abs(float(parameter.std()) / (bound / math.sqrt(3)) - 1) < 0.06
        assert abs(float(parameter.mean())) < 0.08 * bound
        quarters = torch.histc(parameter, 4, -bound, bound) / parameter.numel()
        assert bool(((quarters > 0.2) & (quarters < 0.3)).all())


def test_the_base_keeps_its_tensors_its_dtype_and_learns_nothing(tiny_base: Callable[..., Path]) -> None:
    model = load_model(tiny_base(), torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    apply_adapter(model, AdapterSpec(3, 6, 0.0, tuple(SEVEN)))
    after = dict(model.named_parameters())
    assert all(after[name].data_ptr() == pointer for name, pointer in before.items())
    assert {name for name, parameter in after.items() if parameter.requires_grad} == after.keys() - before.keys()
    assert all(after[name].dtype == torch.bfloat16 for name in before)


def test_a_fresh_adapter_changes_no_logit(tiny_base: Callable[..., Path]) -> None:
    model = load_model(tiny_base())
    with torch.no_grad():
        before = model(IDS)
        apply_adapter(model, AdapterSpec(3, 6, 0.5, tuple(SEVEN)))
        assert torch.equal(model.eval()(IDS), before)


def test_the_same_seed_draws_the_same_a_and_every_matrix_another_one(tiny_base: Callable[..., Path]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = load_model(tiny_base())
        torch.rand(3)  # the global generator has no say
        apply_adapter(model, AdapterSpec(3, 6, 0.0, ("q_proj", "o_proj")), seed)
        drawn.append({name: A.detach() for name, A in adapter_parameters(model) if "lora_A" in name})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    assert len({float(A.sum()) for A in drawn[0].values()}) == len(drawn[0])


def test_dropout_acts_on_the_input_of_a_in_training_alone(tiny_base: Callable[..., Path]) -> None:
    """With B's only column at 1 and A at 1/in, the mean update is the mean of the kept inputs."""
    model = load_model(tiny_base())
    apply_adapter(model, AdapterSpec(1, 2, 0.5, ("q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    x = torch.ones(1, 400, layer.in_features)
    base = x @ layer.weight.T
    with torch.no_grad():
        kept = (layer.train()(x) - base) / 2 / 2  # scaling 2, and what is kept counts twice
        assert bool((kept - kept.round()).abs().max() < 1e-3)
        assert abs(float(kept.mean()) / layer.in_features - 0.5) < 0.02
        torch.testing.assert_close(layer.eval()(x) - base, torch.full_like(base, 2.0 * layer.in_features))


def test_a_target_that_is_no_linear_layer_is_refused_and_the_seven_are_named(tiny_base: Callable[..., Path]) -> None:
    with pytest.raises(SpecError, match=r"q_porj.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"):
        apply_adapter(load_model(tiny_base()), AdapterSpec(3, 6, 0.0, ("q_porj",)))


# The real pretrained model.


@pytest.mark.parametrize("directory", ["stories260K-hf", "stories260K-meta"])
def test_real_adapter_of_peft_gives_the_logits_of_peft(shared_fixtures: Path, directory: str) -> None:
    adapter = shared_fixtures / "peft-adapter-qv"
    with torch.no_grad():
        ours = adapted(shared_fixtures / directory, adapter)(IDS)
    reference = reference_logits(shared_fixtures / "stories260K-hf", adapter=adapter)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("directory", ["stories260K-hf", "stories260K-meta"])
def test_real_base_takes_an_adapter_on_all_seven_targets(
    shared_fixtures: Path, peft_adapter: Callable[..., Path], directory: str, tmp_path: Path
) -> None:
    hf = shared_fixtures / "stories260K-hf"
    adapter = peft_adapter(hf, scale=0.03)
    merge_lora(MergeOptions(shared_fixtures / directory, adapter, tmp_path / "merged"))
    with torch.no_grad():
        ours = adapted(shared_fixtures / directory, adapter)(IDS)
        merged = load_model(tmp_path / "merged")(IDS)
    torch.testing.assert_close(ours, reference_logits(hf, adapter=adapter), atol=1e-4, rtol=0)
    torch.testing.assert_close(merged, ours, atol=1e-5, rtol=1e-6)  # logits of 15: an ulp is 1e-6
