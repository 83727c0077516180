"""Every adapter that PEFT writes for a LLaMA, a row each: its logits, loaded and merged, against PEFT's own."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from llamatune.checkpoints.adapter import check_adapter, load_adapter
from llamatune.checkpoints.adapter_header import read_adapter_header
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions, ModelSource
from llamatune.errors import CheckpointError
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES

from .conftest import save_meta, save_tiny

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models of three blocks, by whether the head is tied."""
    path = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        save_tiny(path / str(tied), tied=tied, num_hidden_layers=3)
    return {tied: path / str(tied) for tied in (False, True)}


def tuned(base: Path, resize: int | None = None) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    return model


def save(path: Path, base: Path, resize: int | None = None, **options) -> Path:
    """An adapter as PEFT saves it, everything that it trains moved from where it started."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tuned(base, resize), LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


def logits_of_peft(base: Path, adapter: Path, resize: int | None = None) -> torch.Tensor:
    model = PeftModel.from_pretrained(tuned(base, resize), adapter).eval()
    with torch.no_grad():
        return model(IDS).logits


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = open_model(ModelSource(model=base, adapter=adapter, device="cpu")).load(ignore_event, never_stop)
    with torch.no_grad():
        return model.by_prefix[""](IDS)


def merged(base: Path, adapter: Path, output: Path, format_: str = "same") -> PreTrainedModel:
    merge_lora(MergeOptions(base, adapter, output, format_))
    return AutoModelForCausalLM.from_pretrained(output).eval()


def assert_equal_to_peft(
    base: Path, adapter: Path, tmp_path: Path, expected: torch.Tensor | None = None, format_: str = "same"
) -> None:
    expected = logits_of_peft(base, adapter) if expected is None else expected
    torch.testing.assert_close(logits(base, adapter), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        found = merged(base, adapter, tmp_path / "merged", format_)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


ROWS = {
    "all-linear, saved as full paths": {"target_modules": "all-linear"},
    "full paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
    "dotted names": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "a pattern of some layers": {"target_modules": r"model\.layers\.[02]\..*(q_proj|up_proj)"},
    "unsloth's pattern": {"target_modules": UNSLOTH},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "exclude_modules as a pattern": {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.(0|1)\..*"},
    "one layer": {"layers_to_transform": 1},
    "layers by a pattern": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "ranks by name": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "ranks by pattern": {
        "rank_pattern": {r"layers\.[01]\..*v_proj": 3, "model.layers.2.self_attn.v_proj": 5, "v_proj": 7},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1.5, r".*\.2\..*": 16},
    },
    "rsLoRA with ranks": {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "drawn from a Gaussian": {"init_lora_weights": "gaussian"},
    "not zero at first": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "DoRA": {"use_dora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 2}},
    "DoRA of the head": {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
    "bias all": {"bias": "all"},
    "head whole": {"modules_to_save": ["lm_head"]},
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole and tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm"]},
    "a linear layer whole": {"modules_to_save": ["o_proj", "v_proj"]},
    "a submodule whole": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "head's LoRA": {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 3}},
    "embedding's LoRA": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "both tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 95]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "other tokens of the head": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [4]}},
}
BIASES = {
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "bias of B": {"lora_bias": True, "alpha_pattern": {"v_proj": 3}},
    "a layer with its bias": {"modules_to_save": ["v_proj"], "target_modules": ["q_proj", "down_proj"]},
}
STAY_TIED = ("both whole and tied", "both tied", "tokens", "tokens of both")
OUTSIDE_BLOCKS = [
    row for row in ROWS if any(word in row for word in ("whole", "head", "embedding", "both", "tokens", "norms"))
]


@pytest.mark.parametrize("row", ROWS)
def test_logits_are_pefts(bases, tmp_path, row):
    assert_equal_to_peft(bases[False], save(tmp_path / "a", bases[False], **ROWS[row]), tmp_path)


@pytest.mark.parametrize("row", OUTSIDE_BLOCKS)
def test_logits_on_a_tied_base_are_pefts(bases, tmp_path, row):
    adapter = save(tmp_path / "a", bases[True], **ROWS[row])
    assert_equal_to_peft(bases[True], adapter, tmp_path)
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    touched = load_adapter(adapter).base_changes.keys() & {"model.embed_tokens.weight", "lm_head.weight"}
    assert tied is (row in STAY_TIED or not touched)


@pytest.mark.parametrize("row", BIASES)
@pytest.mark.parametrize("biased", [False, True])
def test_biases_are_pefts(bases, tmp_path, row, biased):
    base = tmp_path / "base" if biased else bases[False]
    if biased:
        save_tiny(base, attention_bias=True, mlp_bias=True)
    assert_equal_to_peft(base, save(tmp_path / "a", base, **BIASES[row]), tmp_path)
    facts = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert facts["attention_bias"] is (biased or row == "bias of B")
    assert facts["mlp_bias"] is biased


def test_a_bias_that_no_configuration_can_state_is_refused(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**shape)).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    assert_equal_to_peft(base, save(tmp_path / "a", base, lora_bias=True), tmp_path)
    adapter = save(tmp_path / "b", base, lora_bias=True, target_modules=["q_proj", "o_proj"])
    for use in (logits, lambda model, adapter: merged(model, adapter, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="adds a bias to o_proj, which no configuration of a qwen2"):
            use(base, adapter)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "row",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [96, 98]}],
    ids=["saved", "trained", "new tokens trained"],
)
def test_a_larger_vocabulary_is_the_models(bases, tmp_path, tied, row):
    base, adapter = bases[tied], save(tmp_path / "a", bases[tied], resize=99, **row)
    assert_equal_to_peft(base, adapter, tmp_path, logits_of_peft(base, adapter, resize=99))
    assert open_checkpoint(tmp_path / "merged").config.vocab_size == 99
    opened = open_model(ModelSource(model=base, adapter=adapter, device="cpu", compare=True))
    models = opened.load(ignore_event, never_stop).by_prefix
    assert (opened.config.vocab_size, opened.checkpoint.config.vocab_size) == (99, 96)
    with torch.no_grad():
        torch.testing.assert_close(models["base_"](IDS), tuned(base)(IDS).logits, rtol=0, atol=1e-4)
        assert models[""](torch.tensor([[98]])).shape == (1, 1, 99)


def test_a_base_in_metas_format(bases, tmp_path):
    base = save_meta(tmp_path / "meta", tuned(bases[True]))
    adapter = save(tmp_path / "a", bases[True], modules_to_save=["embed_tokens", "k_proj"])
    assert_equal_to_peft(base, adapter, tmp_path, logits_of_peft(bases[True], adapter), "hf")


def test_a_whole_module_is_quantised_as_the_bases(bases, tmp_path):
    adapter = save(tmp_path / "a", bases[False], modules_to_save=["mlp"])
    stored = load_file(adapter / "adapter_model.safetensors")
    stored = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in stored.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    merged(bases[False], adapter, tmp_path / "merged")
    model, whole = (
        open_model(ModelSource(model=path, device="cpu", dtype="nf4", **more)).load(ignore_event, never_stop)
        for path, more in ((bases[False], {"adapter": adapter}), (tmp_path / "merged", {}))
    )
    with torch.no_grad():
        assert torch.equal(model.by_prefix[""](IDS), whole.by_prefix[""](IDS))


def test_merging_is_pefts_merge(bases, tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "modules_to_save": ["down_proj"]}
    adapter = save(tmp_path / "a", bases[False], **options)
    expected = PeftModel.from_pretrained(tuned(bases[False]), adapter).merge_and_unload().state_dict()
    found = merged(bases[False], adapter, tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_sixteen_bits_are_rounded_once(tmp_path):
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save(tmp_path / "a", tmp_path / "base", target_modules=["lm_head"])
    stored = load_file(adapter / "adapter_model.safetensors")
    names = (f"base_model.model.lm_head.{name}.weight" for name in ("base_layer", "lora_A", "lora_B"))
    W, A, B = (stored[name].float() for name in names)
    exact = W + 2 * B @ A
    found = merged(tmp_path / "base", adapter, tmp_path / "merged").state_dict()["lm_head.weight"]
    assert torch.equal(found, exact.bfloat16())
    assert torch.equal(logits(tmp_path / "base", adapter), merged_logits := logits_of(tmp_path / "merged"))
    assert merged_logits.dtype == torch.bfloat16


def test_a_head_that_sixteen_bits_cannot_hold_is_refused(bases, tmp_path):
    adapter = save(tmp_path / "a", bases[False], modules_to_save=["lm_head"])
    stored = load_file(adapter / "adapter_model.safetensors")
    stored["base_model.model.lm_head.weight"][0, 0] = 1e6
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 1e\+06, which float16 cannot hold"):
        merge_lora(MergeOptions(bases[False], adapter, tmp_path / "merged", "same", "float16"))
    assert not (tmp_path / "merged").exists()


def logits_of(model: Path) -> torch.Tensor:
    loaded = open_model(ModelSource(model=model, device="cpu")).load(ignore_event, never_stop).by_prefix[""]
    with torch.no_grad():
        return loaded(IDS)


OF_PEFT = {
    "0.2": {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8,
            "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 4,
            "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "0.3": {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
            "lora_alpha": 8, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4,
            "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "0.4": {"auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 8,
            "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4, "revision": None,
            "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "0.7": {"alpha_pattern": {}, "auto_mapping": None, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
            "loftq_config": {}, "lora_alpha": 8, "lora_dropout": 0.05, "megatron_config": None,
            "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 4,
            "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"],
            "task_type": "CAUSAL_LM"},
    "0.10": {"alpha_pattern": {}, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
             "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
             "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
             "lora_alpha": 8, "lora_dropout": 0, "megatron_config": None, "megatron_core": "megatron.core",
             "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {}, "revision": None,
             "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM", "use_dora": False,
             "use_rslora": False},
    "0.18": {"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
             "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
             "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
             "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
             "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
             "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
             "peft_version": "0.18.0", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
             "target_modules": ["v_proj", "q_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
             "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """A plain adapter and PEFT's logits with it."""
    path = save(tmp_path_factory.mktemp("plain") / "a", bases[False])
    return path, logits_of_peft(bases[False], path)


def rewritten(adapter: Path, output: Path, config: dict | None = None, rename=lambda name: name) -> Path:
    """A copy with another configuration or other names of the tensors."""
    output.mkdir(parents=True)
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in stored.items()}, output / "adapter_model.safetensors")
    facts = json.loads((adapter / "adapter_config.json").read_text()) if config is None else config
    (output / "adapter_config.json").write_text(json.dumps(facts))
    return output


@pytest.mark.parametrize("version", OF_PEFT)
def test_configurations_of_older_releases(bases, plain, tmp_path, version):
    adapter = rewritten(plain[0], tmp_path / "a", OF_PEFT[version])
    torch.testing.assert_close(logits(bases[False], adapter), plain[1], rtol=0, atol=1e-4)


NAMES = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "of a wrapped model": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("row", NAMES)
def test_other_names_of_the_tensors(bases, plain, tmp_path, row):
    adapter = rewritten(plain[0], tmp_path / "a", rename=NAMES[row])
    torch.testing.assert_close(logits(bases[False], adapter), plain[1], rtol=0, atol=1e-4)


def test_a_saved_module_under_the_names_of_a_whole_state_dict(bases, tmp_path):
    adapter = save(tmp_path / "a", bases[False], modules_to_save=["lm_head", "mlp"])
    expected = logits_of_peft(bases[False], adapter)

    def whole(name: str) -> str:
        return name.replace("lm_head.", "lm_head.modules_to_save.default.").replace(".mlp.", ".mlp.modules_to_save.")

    copy = rewritten(adapter, tmp_path / "b", rename=whole)
    stored = load_file(copy / "adapter_model.safetensors")
    stored["base_model.model.lm_head.original_module.weight"] = torch.ones(96, 32)
    save_file(stored, copy / "adapter_model.safetensors")
    torch.testing.assert_close(logits(bases[False], copy), expected, rtol=0, atol=1e-4)


def test_a_named_folder_and_an_archive(bases, plain, tmp_path):
    (tmp_path / "named").mkdir()
    shutil.copytree(plain[0], tmp_path / "named" / "default")
    torch.testing.assert_close(logits(bases[False], tmp_path / "named"), plain[1], rtol=0, atol=1e-4)
    (tmp_path / "named" / "default").rename(tmp_path / "named" / "poet")
    with pytest.raises(CheckpointError, match=r"did you mean .*poet"):
        load_adapter(tmp_path / "named")
    (tmp_path / "bin").mkdir()
    shutil.copy(plain[0] / "adapter_config.json", tmp_path / "bin")
    stored = load_file(plain[0] / "adapter_model.safetensors")
    views = {name: tensor.T.contiguous().T for name, tensor in stored.items()}  # of other strides
    torch.save(views, tmp_path / "bin" / "adapter_model.bin")
    torch.testing.assert_close(logits(bases[False], tmp_path / "bin"), plain[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "last", "stated"), [("lora", 2, True), ("lora", -1, False), ("dora", 2, False)])
def test_mlx_adapters(bases, tmp_path, kind, last, stated):
    layers = [1, 2] if last == 2 else [0, 1, 2]
    options = {"layers_to_transform": layers, "r": 4, "lora_alpha": 80, "use_dora": kind == "dora"}
    peft = save(tmp_path / "peft", bases[False], target_modules=["q_proj", "down_proj"], **options)
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
    tensors = {}
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        module, _, end = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{module}.{names[f'lora_{end}']}"] = tensor.mT.contiguous() if tensor.ndim == 2 else tensor
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    if stated:
        parameters["keys"] = ["self_attn.q_proj", "mlp.down_proj"]
    facts = {"fine_tune_type": kind, "num_layers": last, "lora_parameters": parameters, "model": "some/base"}
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(facts))
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    assert_equal_to_peft(bases[False], tmp_path / "mlx", tmp_path, logits_of_peft(bases[False], peft))
    if last == 2:
        facts["num_layers"] = 1
        (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=r"unexpected: model.layers.1.*num_layers 1"):
            logits(bases[False], tmp_path / "mlx")


def test_mlx_adapter_of_a_tied_embedding(bases, tmp_path):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((96, 4), (4, 32)))
    facts = {"num_layers": 0, "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    save_file({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, tmp_path / "adapters.safetensors")
    model = tuned(bases[True])
    with torch.no_grad():
        model.model.embed_tokens.weight += 3 * a @ b
        torch.testing.assert_close(logits(bases[True], tmp_path), model(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format_", ["hf", "meta"])
def test_an_untied_head_is_written_in_either_format(bases, tmp_path, format_):
    adapter = save(tmp_path / "a", bases[True], modules_to_save=["lm_head"])
    merge_lora(MergeOptions(bases[True], adapter, tmp_path / "merged", format_))
    config = open_checkpoint(tmp_path / "merged").config
    assert not config.tie_word_embeddings
    expected = logits_of_peft(bases[True], adapter)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, rtol=0, atol=1e-4)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "merged" / "llamatune.json").unlink()
    again = merge_lora(MergeOptions(tmp_path / "merged", plain_of(bases[True], tmp_path), tmp_path / "twice", "hf"))
    assert again.tensors == len(open_checkpoint(tmp_path / "merged").shapes)


def plain_of(base: Path, tmp_path: Path) -> Path:
    return save(tmp_path / "other", base, target_modules=["k_proj"])


def test_what_all_blocks_have_is_named_by_its_module(bases, tmp_path):
    options = {"target_modules": list(LINEAR_MODULES), "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}}
    spec = load_adapter(save(tmp_path / "a", bases[False], **options)).config
    assert spec.target_modules == tuple(sorted(LINEAR_MODULES))
    assert dict(spec.module_ranks) == {"q_proj": 2, "layers.1.mlp.up_proj": 3}
    assert (spec.rank("up_proj", 0), spec.rank("up_proj", 1), spec.scaling("q_proj", 2)) == (4, 3, 4.0)


COUNTED = ("a pattern of some layers", "ranks by pattern", "DoRA", "head whole", "a submodule whole", "both", "tokens")


@pytest.mark.parametrize("row", COUNTED)
def test_parameters_are_counted_as_peft_counts_them(bases, tmp_path, row):
    header = read_adapter_header(save(tmp_path / "a", bases[False], **ROWS[row]))
    model = PeftModel.from_pretrained(tuned(bases[False]), tmp_path / "a", is_trainable=True)
    count = count_parameters(open_checkpoint(bases[False]).config, header.spec, header.others)
    assert count.trainable_parameters == model.get_nb_trainable_parameters()[0]


OTHER_BASES = [
    ({"hidden_size": 64}, {}, "hidden_size 64, here 32"),
    ({"hidden_size": 64, "num_hidden_layers": 5}, {}, "hidden_size 64, here 32"),
    ({"num_hidden_layers": 2}, {}, "num_hidden_layers 2, here 3"),
    ({"num_hidden_layers": 5}, {}, "num_hidden_layers 5 or more, here 3"),
    ({"num_key_value_heads": 1}, {}, "num_key_value_heads x head_dim 8, here 16"),
    ({"head_dim": 16}, {}, "num_attention_heads x head_dim 64, here 32"),
    ({"intermediate_size": 96}, {"target_modules": ["gate_proj"]}, "intermediate_size 96, here 88"),
    ({"num_hidden_layers": 5}, {"layers_to_transform": [4]}, "num_hidden_layers 5 or more, here 3"),
]


@pytest.mark.parametrize(("changes", "options", "told"), OTHER_BASES)
def test_an_adapter_of_another_base_names_it_and_what_differs(bases, tmp_path, changes, options, told):
    """PEFT's own has no fingerprint: its tensors tell. It is one short line in place of a list of tensors."""
    save_tiny(tmp_path / "other", **changes)
    adapter = save(tmp_path / "a", tmp_path / "other", **options)
    merge = MergeOptions(bases[False], adapter, tmp_path / "merged")
    for use in (lambda: logits(bases[False], adapter), lambda: merge_lora(merge)):
        with pytest.raises(CheckpointError) as caught:
            use()
        named = f"the adapter was trained on another base ({tmp_path / 'other'}), of another shape ({told})"
        assert str(caught.value) == f"{named}: {adapter}: give that base"
    assert not (tmp_path / "merged").exists()


def test_an_update_of_the_embedding_tells_the_vocabulary(bases, tmp_path):
    """Without the embedding itself, which PEFT saves beside it unless it is told not to."""
    save_tiny(tmp_path / "other", vocab_size=100)
    adapter = save(tmp_path / "a", tmp_path / "other", target_modules=["q_proj", "embed_tokens"])
    stored = load_file(adapter / "adapter_model.safetensors")
    updates = {name: tensor for name, tensor in stored.items() if ".lora_" in name}
    assert len(updates) == len(stored) - 1
    save_file(updates, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another base .*, of another shape \(vocab_size 100, here 96\)"):
        check_adapter(load_adapter(adapter), open_checkpoint(bases[False]).config)


def test_an_adapter_that_names_no_base_says_what_differs(bases, tmp_path):
    save_tiny(tmp_path / "other", hidden_size=64)
    adapter = save(tmp_path / "a", tmp_path / "other")
    facts = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"^the adapter was trained on another base, of another shape \(hidden"):
        check_adapter(load_adapter(adapter), open_checkpoint(bases[False]).config)


@pytest.mark.parametrize("damage", ["one tensor", "every A transposed", "a tensor gone", "ranks"])
def test_a_damaged_adapter_does_not_pass_for_one_of_another_base(bases, tmp_path, damage):
    adapter = save(tmp_path / "a", bases[False])
    stored = load_file(adapter / "adapter_model.safetensors")
    first, *others = sorted(stored)
    if damage == "one tensor":
        stored[first] = torch.ones(4, 64)
    elif damage == "a tensor gone":
        del stored[others[-1]]
    else:
        turned = [name for name in stored if ".lora_A." in name]
        stored |= {name: torch.ones(*((32, 4) if damage != "ranks" else (5, 32))) for name in turned}
    save_file(stored, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: |wrong shape: "):
        check_adapter(load_adapter(adapter), open_checkpoint(bases[False]).config)
