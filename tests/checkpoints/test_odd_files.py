"""Files that transformers reads, or that only look odd: the same model comes out, and a notice says what was done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError
from llamatune.events import Notice
from llamatune.tokenizers.loading import load_tokenizer

from .conftest import save_meta, save_tiny

TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))


def opened(path):
    """Logits and notices."""
    events = []
    model = load_model(path, on_event=events.append)
    with torch.no_grad():
        return model(TOKENS), [event.message for event in events if isinstance(event, Notice)]


def changed(source, target, change):
    """A copy whose tensors are what ``change`` makes of them."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    (target / "model.safetensors").unlink()
    save_file(change(weights), target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (lambda w: {f"_orig_mod.{name}": x for name, x in w.items()}, "torch's wrappers"),
        (lambda w: {f"module._orig_mod.{name}": x for name, x in w.items()}, "torch's wrappers"),
        (lambda w: {name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): x for name, x in w.items()}, "wrappers"),
        (lambda w: {name.removeprefix("model."): x for name, x in w.items()}, "lack the part 'model.'"),
        (lambda w: w | {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}, "v_head"),
        (lambda w: w | {"model.rotary_emb.inv_freq": torch.ones(4)}, None),
        (lambda w: w | {"model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(4)}, None),
    ],
)  # fmt: skip
def test_names_of_wrappers_and_tensors_of_no_use(tiny, tmp_path, change, notice):
    path = changed(tiny[0], tmp_path / "m", change)
    logits, notices = opened(path)
    assert torch.equal(logits, opened(tiny[0])[0])
    assert [notice in told for told in notices] == ([True] if notice else [])


def test_two_tensors_of_one_name_are_refused(tiny, tmp_path):
    path = changed(tiny[0], tmp_path / "m", lambda w: w | {"module.model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"two tensors are called model\.norm\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("shards", [False, True])
def test_weights_in_fp64_are_read_as_fp32(tiny, tiny_adapter, tmp_path, shards):
    model = save_tiny(tmp_path / "m", dtype=torch.float64, shard="20KB" if shards else "5GB")
    meta = save_meta(tmp_path / "meta", model, shards=1 + shards)
    for path in (tmp_path / "m", meta):
        logits, notices = opened(path)
        torch.testing.assert_close(logits, opened(tiny[0])[0], atol=1e-6, rtol=0)
        assert [told.endswith("weights in fp64 are read as fp32") for told in notices] == [True]
        rows = open_checkpoint(path).rows("model.norm.weight", [3, 5])
        assert torch.equal(rows, model.model.norm.weight[[3, 5]].float())
    merge_lora(MergeOptions(tmp_path / "m", tiny_adapter, tmp_path / "out", force_base=True))
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["dtype"] == facts["torch_dtype"] == "float32"
    files = (tmp_path / "out").glob("*.safetensors")
    assert {x.dtype for file in files for x in load_file(file).values()} == {torch.float32}


def test_the_head_of_a_tied_model_may_stand_for_its_embedding(tmp_path):
    save_tiny(tmp_path / "tied", tied=True)

    def swap(weights):
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        return weights

    path = changed(tmp_path / "tied", tmp_path / "swapped", swap)
    assert torch.equal(opened(path)[0], opened(tmp_path / "tied")[0])
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**facts, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_pytorch_archives_are_read_and_merged(tiny_adapter, tmp_path, tied, shards):
    """As ``save_pretrained(safe_serialization=False)`` of transformers 4 writes them."""
    model = save_tiny(tmp_path / "hf", tied=tied)
    path = tmp_path / "bin"
    path.mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", path)
    state = model.state_dict()  # an OrderedDict with attributes; a tied head shares its storage
    if shards:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, path / "pytorch_model.bin")
    assert torch.equal(opened(path)[0], opened(tmp_path / "hf")[0])
    assert open_checkpoint(path).config == open_checkpoint(tmp_path / "hf").config
    for source in ("hf", "bin"):
        merge_lora(MergeOptions(tmp_path / source, tiny_adapter, tmp_path / f"{source}-merged", force_base=True))
    assert not list((tmp_path / "bin-merged").glob("*.bin"))
    assert torch.equal(opened(tmp_path / "bin-merged")[0], opened(tmp_path / "hf-merged")[0])


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_variant_is_read_where_it_is_asked_for(tiny, tiny_adapter, tmp_path, shard):
    path = tmp_path / "m"
    model = save_tiny(tmp_path / "plain", dtype=torch.float16)
    model.save_pretrained(path, variant="fp16", max_shard_size=shard)
    assert not (path / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"only the variant fp16 of the weights: .*: pass --variant fp16"):
        open_checkpoint(path)
    model.float().save_pretrained(path, variant="fp32", max_shard_size=shard)
    with pytest.raises(CheckpointError, match=r"only variants \(fp16, fp32\) of the weights: .*model\.variant=fp16"):
        read_config(path)
    with pytest.raises(CheckpointError, match=r"no variant 'bf16' of the weights: .*: there is fp16, fp32"):
        open_checkpoint(path, variant="bf16")
    dtypes = {
        name: {part.dtype for [part] in open_checkpoint(path, variant=name).parts.values()} for name in ("fp16", "fp32")
    }
    assert dtypes == {"fp16": {"F16"}, "fp32": {"F32"}}
    facts = json.loads((path / "config.json").read_text())
    assert facts["dtype"] == "float32"  # of the one that was saved last
    merge_lora(MergeOptions(path, tiny_adapter, tmp_path / "out", force_base=True, variant="fp16"))
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged["dtype"] == merged["torch_dtype"] == "float16"
    assert not list((tmp_path / "out").glob("*fp16*"))
    assert opened(tmp_path / "out")[1] == []
    save_tiny(tmp_path / "other").save_pretrained(path, max_shard_size=shard)
    assert opened(path)[1] == []
    with pytest.raises(CheckpointError, match=r"no variant 'fp16' of the weights: .*: leave --variant out"):
        open_checkpoint(tiny[0], variant="fp16")


def test_meta_directories_have_no_variants(tiny_meta):
    for read in (open_checkpoint, read_config):
        with pytest.raises(CheckpointError, match=r"Meta's format has none: .*: leave --variant out"):
            read(tiny_meta, variant="fp16")


def test_shards_may_lie_in_a_folder(tiny, tmp_path):
    path = tmp_path / "m"
    save_tiny(path, shard="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"weights/{shard}" for name, shard in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "weights").mkdir()
    for shard in path.glob("*.safetensors"):
        shard.rename(path / "weights" / shard.name)
    assert torch.equal(opened(path)[0], opened(tiny[0])[0])


@pytest.mark.parametrize(
    ("config", "generation", "expected", "told"),
    [
        (-1, None, (), False), (-1, -1, (), False), (None, None, (2,), False), (5, -1, (5,), False),
        ([5, 5, 9], None, (5, 9), False), ([-1, 5], None, (5,), False), ([-1], [-1, -1], (), False),
        (5, [5, 9], (5, 9), False), (5, 9, (9,), True), ([5, 9], 9, (9,), True),
    ],
)  # fmt: skip
def test_ends_of_texts(tiny, tmp_path, config, generation, expected, told):
    shutil.copytree(tiny[0], tmp_path / "m")
    facts = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**facts, "eos_token_id": config}))
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    events = []
    assert read_config(tmp_path / "m", events.append).eos_token_ids == expected
    assert ["the former is used" in event.message for event in events] == [True] * told


def test_two_names_of_a_dtype(tiny, tiny_adapter, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "m")
    facts = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**facts, "torch_dtype": "bfloat16"}))
    events = []
    merge_lora(MergeOptions(tmp_path / "m", tiny_adapter, tmp_path / "out", force_base=True), events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert ["dtype is float32 and torch_dtype is bfloat16" in message for message in told].count(True) == 1
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"


def test_swish_is_silu(tiny, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "m")
    facts = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**facts, "hidden_act": "swish"}))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "m")[0], theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_hints_lead_on(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7B").mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    for make, words in (
        (lambda: open_checkpoint(Path("meta-llama/Llama-3.2-1B")), "hf download meta-llama/Llama-3.2-1B --local-dir"),
        (lambda: open_checkpoint(tmp_path / "absent"), "no such model directory"),
        (lambda: load_tokenizer(tmp_path / "7B"), rf"LLaMA-1 has it beside .*: link {tmp_path}/tokenizer\.model into"),
        (lambda: load_tokenizer(Path("7B")), rf"LLaMA-1 has it beside .*: link {tmp_path}/tokenizer\.model into"),
    ):
        with pytest.raises(CheckpointError, match=words):
            make()
    for name, words in (
        ("model.gguf", "only a GGUF file"), ("pytorch_model-00001-of-00002.bin", r"pytorch_model\.bin\.index\.json"),
        ("model-00001-of-00002.safetensors", "fetch the index too"),
    ):  # fmt: skip
        path = tmp_path / name.replace(".", "-")
        path.mkdir()
        shutil.copy(tiny[0] / "config.json", path)
        (path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)
