"""``extract-lora``: what was merged is found again, and what an adapter cannot hold is told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.adapter import Adapter, load_adapter, write_adapter
from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.extraction import decomposed, extract_lora
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.conversion import ConvertOptions, ExtractOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, Stopped
from llamatune.events import Notice, Progress
from llamatune.formats.manifest import build_directory
from llamatune.shapes.adapter import AdapterSpec


@pytest.fixture(scope="module")
def pair(tiny_base, tmp_path_factory):
    """A base and the same with an adapter of rank 4 merged into it."""
    folder, base = tmp_path_factory.mktemp("pair"), tiny_base()
    spec, generator = (
        AdapterSpec(4, 6.0, target_modules=("q_proj", "v_proj", "up_proj")),
        torch.Generator().manual_seed(3),
    )
    shapes = spec.checkpoint_shapes(read_config(base))
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}
    with build_directory(folder / "adapter", "adapter", {}) as staging:
        write_adapter(staging, Adapter(spec, tensors, template={"name": "x"}))
    merge_lora(MergeOptions(base, folder / "adapter", folder / "merged"))
    return base, folder / "merged"


def changed(source, path, change):
    shutil.copytree(source, path)
    (path / "llamatune.json").unlink(missing_ok=True)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("r", [4, 7])
def test_a_merged_adapter_is_found_again(pair, tmp_path, r):
    base, tuned = pair
    report = extract_lora(ExtractOptions(base, tuned, tmp_path / "found", r))
    assert report.retained_energy > 0.999999
    assert report.target_modules == ["q_proj", "up_proj", "v_proj"]
    assert len(report.matrices) == 9
    assert report.left_out == {}
    adapter = load_adapter(tmp_path / "found")
    assert (adapter.config.r, adapter.config.alpha, adapter.base_path) == (r, r, str(base))
    assert adapter.base_fingerprint is not None
    merge_lora(MergeOptions(base, tmp_path / "found", tmp_path / "again"))
    one, other = load_file(tuned / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name, W in one.items():
        torch.testing.assert_close(other[name], W, atol=4e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_16_bits_comes_back_within_its_rounding(pair, tmp_path, dtype):
    base, tuned = pair
    convert(ConvertOptions(tuned, tmp_path / "rounded", dtype=dtype))
    report = extract_lora(ExtractOptions(base, tmp_path / "rounded", tmp_path / "found", 48))
    assert report.retained_energy > 0.9999, "at full rank the rounding is held too"
    merge_lora(MergeOptions(base, tmp_path / "found", tmp_path / "again", dtype=dtype))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "again"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        torch.testing.assert_close(other[name].float(), one[name].float(), atol=1e-2, rtol=1e-2)


def test_retained_energy_is_what_the_update_holds(pair, tmp_path):
    base, tuned = pair
    report = extract_lora(ExtractOptions(base, tuned, tmp_path / "found", 3))
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    adapter = load_adapter(tmp_path / "found")
    for matrix in report.matrices:
        difference = (after[matrix.name] - before[matrix.name]).double()
        left = difference - adapter.merged(matrix.name, torch.zeros(difference.shape)).double()
        assert matrix.norm == pytest.approx(float(difference.norm()), rel=1e-6)
        assert matrix.retained == pytest.approx(1 - float(left.norm() / difference.norm()) ** 2, abs=1e-5)
        values = torch.linalg.svdvals(difference)
        for rank, held in matrix.energy.items():
            assert held == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), abs=1e-5)
        assert [*matrix.energy] == [1, 2, 3]


def test_what_no_adapter_holds_is_told_with_its_size(pair, tmp_path):
    base, tuned = pair

    def change(weights):
        weights["model.norm.weight"] *= 2
        weights["model.embed_tokens.weight"][3] += 1
        weights["lm_head.weight"] += 0.01

    other = changed(tuned, tmp_path / "tuned", change)
    events: list[object] = []
    options = ExtractOptions(base, other, tmp_path / "found", 4, "q_proj, v_proj")
    report = extract_lora(options, events.append)
    assert report.target_modules == ["q_proj", "v_proj"]
    assert {name for name in report.left_out if "up_proj" not in name} == {
        "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    difference, size = report.left_out["model.norm.weight"]
    assert difference == pytest.approx(size)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "and 1 more" in notices[0]
    assert "model.embed_tokens.weight (" in notices[0]


def test_a_large_matrix_is_decomposed_by_subspace_iteration():
    """Exactly where its rank is small, and nearly so where its values fall slowly."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(1100, 64, generator=generator)).Q for _ in "UV")
    small = torch.cat((torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25]), torch.zeros(57)))
    slow = 0.9 ** torch.arange(64)
    for values, tolerance in ((small, 1e-5), (slow, 1e-3)):
        D = (U * values) @ V.T
        left, found, right, method = decomposed(D, 7)
        assert method == "randomised"
        torch.testing.assert_close(found, values[:7], atol=tolerance, rtol=0)
        held = float(((left * found) @ right - D).square().sum())
        assert held == pytest.approx(float(values[7:].square().sum()), rel=1e-3, abs=1e-6)
    assert decomposed(torch.randn(40, 1500, generator=generator), 7)[3] == "full"


def test_the_verb_prints_tables_and_draws(pair, tmp_path, command):
    base, tuned = pair
    words = ("extract-lora", "--base", base, "--tuned", tuned, "--r", 4, "--output", tmp_path / "found")
    done = command(*words, "--plot", tmp_path / "energy.png")
    assert done.code == 0
    assert "rank 4" in done.stdout
    assert "9 matrices, full SVD" in done.stdout
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
    again = command(*words, "--json")
    facts = json.loads(again.stdout)
    assert (again.code, facts["already_done"], facts["plot"]) == (0, True, None)
    assert facts["matrices"][0]["energy"].keys() == {"1", "2", "4"}
    assert command(*words, "--plot", tmp_path / "energy.svg").code == 2
    assert command(*words, "--plot", tmp_path / "energy.png").code == 5, "it exists"
    assert command(*words[:-1], base, "--overwrite").code == 2
    assert command(*words[:-1], tmp_path / "other", "--target-modules", "q_proj,x").code == 2


def test_models_that_do_not_belong_together_are_refused(pair, tiny_base, tmp_path):
    base, tuned = pair
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract_lora(ExtractOptions(base, base, tmp_path / "found", 4))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[131, 48\] and absent"):
        extract_lora(ExtractOptions(base, tiny_base(tie_word_embeddings=True), tmp_path / "found", 4))

    def change(weights):
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN"):
        extract_lora(ExtractOptions(base, changed(tuned, tmp_path / "nan", change), tmp_path / "found", 4))
    for stop_at in (0, 9, 29):
        seen: list[object] = []
        with pytest.raises(Stopped):
            extract_lora(
                ExtractOptions(base, tuned, tmp_path / "found", 4), seen.append,
                lambda seen=seen, stop_at=stop_at: sum(isinstance(e, Progress) for e in seen) >= stop_at,
            )  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["nan"]


def test_formats_may_differ(pair, meta_copy, tmp_path):
    base, tuned = pair
    report = extract_lora(ExtractOptions(meta_copy(base), tuned, tmp_path / "found", 4))
    assert report.retained_energy > 0.999999


def test_what_the_configurations_change_is_told_or_refused(pair, tmp_path):
    """Rope, window and eps decide what a model computes and are in no tensor; other heads give rows another meaning."""
    base, tuned = pair

    def stated(name, **changes):
        shutil.copytree(base, tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        return tmp_path / name

    events = []
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    other = stated("other", rms_norm_eps=1e-3, rope_parameters=linear)
    extract_lora(ExtractOptions(other, tuned, tmp_path / "found", 4), events.append)
    said = [event.message for event in events if isinstance(event, Notice) and event.kind == "warning"]
    assert any("rms_norm_eps" in text and "rope_scaling" in text for text in said)
    heads = stated("heads", num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    with pytest.raises(CheckpointError, match=r"num_attention_heads \(3 and 6\)"):
        extract_lora(ExtractOptions(heads, tuned, tmp_path / "none", 4))
    assert not (tmp_path / "none").exists()


def test_the_plot_cannot_be_the_adapter(pair, tmp_path, command):
    base, tuned = pair
    both = tmp_path / "found.png"
    assert command("extract-lora", "--base", base, "--tuned", tuned, "--output", both, "--plot", both).code == 2
    assert not both.exists()
