"""``convert-adapter``: the update that other tools compute from what is written is the adapter's own."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.adapter import Adapter, load_adapter, write_adapter
from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.converting_adapters import convert_adapter
from llamatune.checkpoints.gguf_config import gguf_name
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.conversion import ConvertAdapterOptions, ConvertOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.formats.manifest import build_directory, verify_product
from llamatune.model.adapters.dora import DoRALinear
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES

UNEVEN = AdapterSpec(
    4, 6.0, 0.05, ("q_proj", "k_proj", "layers.1.mlp.up_proj"), module_ranks=(("k_proj", 2),),
    module_alphas=(("layers.1.mlp.up_proj", 20.0),),
)  # fmt: skip
SPECS = {
    "plain": AdapterSpec(3, 7.0, 0.1, ("q_proj", "v_proj", "down_proj")),
    "all": AdapterSpec(5, 5.0, target_modules=LINEAR_MODULES),
    "rsLoRA": AdapterSpec(4, 6.0, target_modules=("q_proj", "o_proj"), use_rslora=True),
    "alpha 0": AdapterSpec(4, 0.0),
    "negative": AdapterSpec(4, -3.0),
    "uneven": UNEVEN,
}


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "base"
    shutil.copytree(tiny_base(), path, ignore=shutil.ignore_patterns("tokenizer.model"))
    return path


def made_adapter(spec, config, path=None, base=None):
    generator = torch.Generator().manual_seed(3)
    tensors = {n: torch.randn(shape, generator=generator) * 0.3 for n, shape in spec.checkpoint_shapes(config)}
    adapter = Adapter(spec, tensors, base_path=None if base is None else str(base))
    if path is not None:
        with build_directory(path, "adapter", {}) as staging:
            write_adapter(staging, adapter)
    return adapter


def updates(adapter, config):
    """The update of every weight that the adapter changes, fp32."""
    zeros = {name: torch.zeros(shape) for name, shape in config.parameter_shapes() if adapter.changes(name)}
    return {name: adapter.merged(name, W) for name, W in zeros.items()}


@pytest.fixture(params=SPECS)
def adapter(request, base, tmp_path, monkeypatch):
    """An adapter as ``load_adapter`` gives it. What PEFT's file cannot say yet is given without a file."""
    config = read_config(base)
    made = made_adapter(SPECS[request.param], config)
    (tmp_path / "adapter").mkdir()
    loaded = Adapter(made.config, made.tensors, path=tmp_path / "adapter", digest="0" * 64)
    monkeypatch.setattr("llamatune.checkpoints.converting_adapters.load_adapter", lambda path: loaded)
    return loaded


def test_mlx_lm_computes_the_same_update(adapter, base, tmp_path):
    config = read_config(base)
    report = convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx", base))
    assert verify_product(tmp_path / "mlx").kind == "adapter"
    facts = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    stored, wanted = load_file(tmp_path / "mlx" / "adapters.safetensors"), updates(adapter, config)
    scale, keys, rank = (facts["lora_parameters"][name] for name in ("scale", "keys", "rank"))
    layers = range(config.num_hidden_layers - facts["num_layers"], config.num_hidden_layers)
    assert (facts["fine_tune_type"], rank) == ("lora", report.r)
    assert {*stored} == {f"model.layers.{n}.{key}.{ab}" for n in layers for key in keys for ab in ("lora_a", "lora_b")}
    for layer in layers:  # as mlx_lm/tuner/lora.py fuses them
        for key in keys:
            a, b = (stored[f"model.layers.{layer}.{key}.{name}"] for name in ("lora_a", "lora_b"))
            assert a.shape[1] == b.shape[0] == rank
            name = f"model.layers.{layer}.{key}.weight"
            torch.testing.assert_close((scale * b.T) @ a.T, wanted.pop(name, torch.zeros(b.shape[1], a.shape[0])))
    assert not wanted


def test_llama_cpp_computes_the_same_update(adapter, base, tmp_path):
    config, path = read_config(base), tmp_path / "adapter.gguf"
    convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", path, "gguf", base))
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert [facts[f"general.{key}"] for key in ("architecture", "type")] == ["llama", "adapter"]
    assert facts["adapter.type"] == "lora"
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = facts["adapter.lora.alpha"]
    assert alpha, "llama.cpp takes an alpha of 0 for a scaling of 1"
    for name, wanted in updates(adapter, config).items():
        a, b = (stored.pop(f"{gguf_name(name)}.{part}") for part in ("lora_a", "lora_b"))
        update = alpha / b.shape[1] * (b @ a)
        if "q_proj" in name or "k_proj" in name:
            update = update.view(-1, 4, 2, update.shape[1]).transpose(1, 2).reshape(update.shape)
        torch.testing.assert_close(update, wanted)
    assert not stored


def test_a_merged_model_and_a_converted_adapter_agree_in_gguf(base, tmp_path):
    """base.gguf + adapter.gguf is merged.gguf."""
    made_adapter(SPECS["all"], read_config(base), tmp_path / "adapter", base)
    merge_lora(MergeOptions(base, tmp_path / "adapter", tmp_path / "merged"))
    for name, source in (("base", base), ("merged", tmp_path / "merged")):
        convert(ConvertOptions(source, tmp_path / f"{name}.gguf"))
    convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", tmp_path / "base.gguf"))
    before, after, adapter = (
        {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("base", "merged", "a")
    )
    for name in [name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")]:
        merged = before[name] + adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
        torch.testing.assert_close(merged, after[name])


def test_dora_goes_to_mlx_lm_and_not_to_llama_cpp(base, tmp_path, monkeypatch):
    config = read_config(base)
    spec = AdapterSpec(3, 6.0, target_modules=("q_proj", "down_proj"), kind="dora")
    made = made_adapter(spec, config)
    loaded = Adapter(spec, made.tensors, path=tmp_path / "adapter", digest="0" * 64)
    monkeypatch.setattr("llamatune.checkpoints.converting_adapters.load_adapter", lambda path: loaded)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match="plain LoRA, and this one is dora"):
        convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "x.gguf", "gguf", base))
    convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx", base))
    facts = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (facts["fine_tune_type"], facts["lora_parameters"]["scale"]) == ("dora", 2.0)
    stored, W = load_file(tmp_path / "mlx" / "adapters.safetensors"), torch.randn(48, 48)
    a, b, m = (stored[f"model.layers.1.self_attn.q_proj.{name}"] for name in ("lora_a", "lora_b", "m"))
    adapted = W + 2.0 * (b.T @ a.T)  # as mlx_lm/tuner/dora.py fuses it
    mlx = (m / torch.linalg.vector_norm(adapted, dim=1))[:, None] * adapted
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(mlx, DoRALinear.merged(W, loaded.trained(name), loaded.scaling(name), slice(None)))


def test_the_base_that_the_adapter_names_gives_the_shape(base, tmp_path, command):
    made_adapter(SPECS["plain"], read_config(base), tmp_path / "adapter", base)
    words = ("convert-adapter", "--adapter", tmp_path / "adapter", "--format")
    done = command(*words, "mlx", "--output", tmp_path / "mlx", "--json")
    assert (done.code, json.loads(done.stdout)["updates"]) == (0, 9)
    again = command(*words, "mlx", "--output", tmp_path / "mlx", "--json")
    assert (again.code, json.loads(again.stdout)["already_done"]) == (0, True)
    assert command(*words, "peft", "--output", tmp_path / "peft").code == 0
    one, other = (load_adapter(tmp_path / name).tensors for name in ("adapter", "peft"))
    assert all(one[name].equal(other[name]) for name in one | other)
    assert command(*words, "gguf", "--output", tmp_path / "directory").code == 2
    assert command(*words, "gguf", "--output", tmp_path / "a.gguf").code == 0
    assert command(*words, "gguf", "--output", tmp_path / "a.gguf").code == 5
    assert command(*words, "peft", "--output", tmp_path / "adapter", "--overwrite").code == 2
    with pytest.raises(Stopped):
        options = ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "new", "mlx", base)
        convert_adapter(options, should_stop=lambda: True)
    assert not (tmp_path / "new").exists()


def test_a_base_that_is_not_there_or_another_is_refused(base, tiny_base, tmp_path):
    made_adapter(SPECS["plain"], read_config(base), tmp_path / "adapter")
    with pytest.raises(SpecError, match="--model: give the base"):
        convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx"))
    other = tiny_base(hidden_size=64, num_attention_heads=4)
    with pytest.raises(CheckpointError, match=r"another base.*hidden_size 48, here 64"):
        convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx", other))


@pytest.mark.parametrize("name", SPECS)
def test_mlx_lms_layout_is_read_back_and_goes_to_peft(base, tmp_path, name, monkeypatch):
    """What was written for mlx-lm, read by our own reader of its layout, computes what it computed."""
    config = read_config(base)
    made = made_adapter(SPECS[name], config)
    loaded = Adapter(made.config, made.tensors, path=tmp_path / "adapter", digest="0" * 64)
    (tmp_path / "adapter").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("llamatune.checkpoints.converting_adapters.load_adapter", lambda path: loaded)
        convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx", base))
    convert_adapter(ConvertAdapterOptions(tmp_path / "mlx", tmp_path / "peft", "peft", base))
    wanted = updates(loaded, config)
    for path in ("mlx", "peft"):
        found = updates(load_adapter(tmp_path / path), config)
        for weight, update in found.items():
            torch.testing.assert_close(update, wanted.get(weight, torch.zeros(update.shape)))
        assert wanted.keys() <= found.keys()


def test_peft_opens_what_came_from_mlx_lm(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = AdapterSpec(3, 7.0, target_modules=("layers.1.mlp.up_proj", "layers.2.mlp.up_proj", "q_proj"))
    made_adapter(spec, read_config(base), tmp_path / "adapter", base)
    tokens = torch.arange(20)[None]
    logits = []
    convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "mlx", "mlx", base))
    convert_adapter(ConvertAdapterOptions(tmp_path / "mlx", tmp_path / "peft", "peft", base))
    for path in ("adapter", "peft"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(model, tmp_path / path)(tokens).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_an_adapter_that_changes_more_is_refused(base, peft_adapter, tmp_path):
    adapter = peft_adapter(base, ["q_proj"], modules_to_save=["lm_head"])
    for name, format_ in (("mlx", "mlx"), ("peft", "peft"), ("a.gguf", "gguf")):
        with pytest.raises(CheckpointError, match=r"also changes lm_head\.weight of the base"):
            convert_adapter(ConvertAdapterOptions(adapter, tmp_path / name, format_, base))


@pytest.mark.parametrize("target", ["peft", "mlx"])
def test_what_training_said_of_the_base_goes_along(base, tmp_path, target):
    """A merge warns of an adapter trained on nf4 weights, in whichever layout it comes."""
    spec = SPECS["plain"]
    tensors = made_adapter(spec, read_config(base)).tensors
    with build_directory(tmp_path / "adapter", "adapter", {}) as staging:
        write_adapter(staging, Adapter(spec, tensors, "f" * 64, {"name": "x"}, str(base), base_dtype="nf4"))
    convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / "made", target, base))
    before, after = load_adapter(tmp_path / "adapter"), load_adapter(tmp_path / "made")
    assert after.base_dtype == "nf4"
    assert (after.base_fingerprint, after.template) == (before.base_fingerprint, before.template)


@pytest.mark.parametrize("alpha", [2e38, -2e38, 1e39, 1e300])
@pytest.mark.parametrize("output", ["out", "out.gguf", "out.mlx"])
def test_a_scaling_that_fp32_cannot_hold_is_refused(base, tmp_path, alpha, output):
    made_adapter(AdapterSpec(4, 6.0), read_config(base), tmp_path / "adapter", base)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha, "use_rslora": True}))
    (tmp_path / "adapter" / "llamatune.json").unlink()
    target = {"out": "peft", "out.gguf": "gguf", "out.mlx": "mlx"}[output]
    with pytest.raises(CheckpointError, match=r"too large for fp32|a number is needed"):
        convert_adapter(ConvertAdapterOptions(tmp_path / "adapter", tmp_path / output, target, base))
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("size", [None, 0, 9])
def test_half_an_update_and_one_of_two_ranks_are_named(base, tmp_path, side, size):
    adapter = tmp_path / "adapter"
    made_adapter(SPECS["plain"], read_config(base), adapter, base)
    (adapter / "llamatune.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{side}.weight"
    rank = {"lora_A": 0, "lora_B": 1}[side]
    tensor = tensors.pop(name)
    if size is not None:
        tensors[name] = torch.ones([size if axis == rank else length for axis, length in enumerate(tensor.shape)])
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no .*q_proj\.|does not fit its module"):
        convert_adapter(ConvertAdapterOptions(adapter, tmp_path / "out", "peft"))
    save_file({"base_model.model.lm_head.x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no update of a matrix|also changes"):
        convert_adapter(ConvertAdapterOptions(adapter, tmp_path / "out", "peft"))


def test_no_input_is_replaced(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    made_adapter(SPECS["plain"], read_config(base), tmp_path / "adapter", base)
    for output in ("base", "adapter"):
        options = ConvertAdapterOptions(
            tmp_path / "adapter", tmp_path / output, "mlx", tmp_path / "base", overwrite=True
        )
        with pytest.raises(SpecError, match="would replace"):
            convert_adapter(options)
    assert (tmp_path / "base" / "config.json").exists()
