"""What is read is what transformers reads, from either format, in any number of shards."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.model_directory import detect_format, read_config
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import Notice

from .conftest import save_meta, save_tiny

TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))


def logits(path, **options):
    with torch.no_grad():
        return load_model(path, **options)(TOKENS)


def same_tensors(checkpoint, model):
    state = model.state_dict()
    assert all(torch.equal(checkpoint.tensor(name), state[name]) for name in checkpoint.shapes)


def test_huggingface_logits_are_those_of_transformers(tiny):
    path, model = tiny
    with torch.no_grad():
        torch.testing.assert_close(logits(path), model(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("llama_3_split", [False, True])
def test_meta_shards_of_both_generations_hold_the_same_model(tiny, tmp_path, shards, llama_3_split):
    path, model = tiny
    meta = save_meta(tmp_path / "meta", model, shards=shards, llama_3_split=llama_3_split)
    checkpoint = open_checkpoint(meta)
    same_tensors(checkpoint, model)
    assert torch.equal(logits(meta), logits(path)) or torch.allclose(logits(meta), logits(path), atol=1e-6)
    assert fingerprint(checkpoint) == fingerprint(open_checkpoint(path))
    assert checkpoint.config.vocab_size == 96


def test_rows_are_the_rows_of_the_tensor(tiny, tmp_path):
    for path in (tiny[0], save_meta(tmp_path / "meta", tiny[1], shards=2)):
        checkpoint = open_checkpoint(path)
        for name in checkpoint.shapes:
            rows = [0, 3, 7, checkpoint.shapes[name][0] - 1]
            assert torch.equal(checkpoint.rows(name, rows), checkpoint.tensor(name)[rows]), name


def test_sharded_huggingface(tiny, tmp_path):
    model = save_tiny(tmp_path / "sharded", shard="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    same_tensors(open_checkpoint(tmp_path / "sharded"), model)
    assert fingerprint(open_checkpoint(tmp_path / "sharded")) == fingerprint(open_checkpoint(tiny[0]))


def test_tied_by_flag_by_copy_and_in_meta_have_one_fingerprint(tmp_path):
    model = save_tiny(tmp_path / "tied", tied=True)
    tied = open_checkpoint(tmp_path / "tied")
    assert tied.config.tie_word_embeddings
    assert "lm_head.weight" not in tied.shapes
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "tied"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)

    twice = tmp_path / "twice"
    twice.mkdir()
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, twice / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    (twice / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(twice).config.tie_word_embeddings
    (twice / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    stored_twice = open_checkpoint(twice)
    assert not stored_twice.config.tie_word_embeddings

    meta = open_checkpoint(save_meta(tmp_path / "meta", model))
    assert len({fingerprint(c) for c in (tied, stored_twice, meta)}) == 1


def test_a_tied_flag_with_another_head_is_untied(tmp_path):
    save_tiny(tmp_path / "m", tied=True)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert not open_checkpoint(tmp_path / "m").config.tie_word_embeddings


def test_meta_without_a_head_is_tied_and_an_aliased_head_is_accepted(tiny, tmp_path):
    for name in ("absent", "aliased"):
        path = save_meta(tmp_path / name, tiny[1])
        state = torch.load(path / "consolidated.00.pth", weights_only=True)
        del state["output.weight"]
        if name == "aliased":
            state["output.weight"] = state["tok_embeddings.weight"]
        torch.save(state, path / "consolidated.00.pth")
        assert open_checkpoint(path).config.tie_word_embeddings is (name == "absent")
        events = []
        load_model(path, on_event=events.append)
        warnings = [event.message for event in events if isinstance(event, Notice)]
        told = [
            f"{path}: no output.weight in the weights; the embedding serves as the head (right only for a tied model)"
        ]
        assert warnings == (told if name == "absent" else [])


def test_old_rotary_buffers_are_ignored(tiny, tmp_path):
    save_tiny(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert list(open_checkpoint(tmp_path / "m").shapes) == list(open_checkpoint(tiny[0]).shapes)


def test_transformers_4_and_5_spellings_agree(tiny, tmp_path):
    raw = json.loads((tiny[0] / "config.json").read_text())
    assert "rope_parameters" in raw  # what transformers 5 writes
    save_tiny(tmp_path / "new", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert read_config(tmp_path / "new").rope_theta == 5000.0
    raw.pop("rope_parameters")
    raw.pop("head_dim")
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "new" / "config.json").write_text(json.dumps({**raw, "rope_theta": 5000.0}))
    assert read_config(tmp_path / "new").rope_theta == 5000.0


HOMES = [
    {"rope_theta": 7e3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
    {"rope_scaling": {"type": "default", "rope_theta": 7000}},
]


@pytest.mark.parametrize("other", [7e3, 5e5])
@pytest.mark.parametrize("homes", [(0, 1), (0, 2), (1, 2)])
def test_theta_in_two_places_must_be_one(tiny, tmp_path, homes, other):
    """transformers 4 and 5 take different ones (vllm#42624)."""
    raw = json.loads((tiny[0] / "config.json").read_text())
    raw.pop("rope_parameters")
    first, second = (json.loads(json.dumps(HOMES[home])) for home in homes)
    (second["rope_parameters"] if homes[1] == 1 else second["rope_scaling"])["rope_theta"] = other
    (tmp_path / "config.json").write_text(json.dumps({**raw, **first, **second}))
    if other == 7e3:
        assert read_config(tmp_path).rope_theta == 7e3
    else:
        with pytest.raises(
            CheckpointError, match=r"rope_theta is 7000\.0, rope_\w+\.rope_theta is 500000\.0: .*config"
        ):
            read_config(tmp_path)


def test_code_llama_has_16384_positions(tiny, tmp_path):
    """So it was trained; Meta's params.json says no more than the base of the rotation."""
    facts = json.loads((save_meta(tmp_path / "meta", tiny[1]) / "params.json").read_text())
    for theta, vocabulary, positions in (
        (None, 32000, 4096), (10000.0, 32016, 4096), (1000000, 32016, 16384), (1e6, 32000, 16384),
        (500000.0, 128256, 8192),
    ):  # fmt: skip
        (tmp_path / "params.json").write_text(json.dumps({**facts, "rope_theta": theta, "vocab_size": vocabulary}))
        assert read_config(tmp_path).max_position_embeddings == positions


def test_stop_tokens_come_from_the_generation_configuration(tiny, tmp_path):
    save_tiny(tmp_path / "m", eos_token_id=[2, 5])
    (tmp_path / "m" / "generation_config.json").unlink(missing_ok=True)
    assert read_config(tmp_path / "m").eos_token_ids == (2, 5)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert read_config(tmp_path / "m").eos_token_ids == (7,)


@pytest.mark.parametrize("path_name", ["hf", "meta"])
@pytest.mark.parametrize("writable", [False, True])
def test_loading_casts_freezes_and_counts(tiny, tiny_meta, path_name, writable):
    path = tiny[0] if path_name == "hf" else tiny_meta
    model = load_model(path, torch.bfloat16, writable=writable)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    state = tiny[1].state_dict()
    assert all(torch.equal(p, state[name].bfloat16()) for name, p in model.named_parameters())


def test_writing_into_a_writable_model_leaves_the_file_alone(tiny):
    before = (tiny[0] / "model.safetensors").read_bytes()
    for writable in (True, False):
        model = load_model(tiny[0], writable=writable)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert (tiny[0] / "model.safetensors").read_bytes() == before


def test_first_layers_only(tiny):
    model = load_model(tiny[0], num_layers=1)
    assert len(model.model.layers) == 1
    with pytest.raises(SpecError):
        load_model(tiny[0], num_layers=3)


def test_nan_in_the_weights_is_a_warning_that_names_them(tmp_path):
    save_tiny(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    events = []
    load_model(tmp_path / "m", on_event=events.append)
    notices = [event for event in events if isinstance(event, Notice)]
    assert [event.kind for event in notices] == ["warning"]
    assert "model.layers.1.mlp.up_proj.weight" in notices[0].message


def test_a_stop_request_ends_loading(tiny):
    with pytest.raises(Stopped):
        load_model(tiny[0], should_stop=lambda: True)


def test_fingerprint_sees_other_weights_and_no_cast(tiny, tmp_path):
    whole = fingerprint(open_checkpoint(tiny[0]))
    save_tiny(tmp_path / "other", rms_norm_eps=1e-5)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert fingerprint(open_checkpoint(tmp_path / "other")) != whole
    half = save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    half.float().save_pretrained(tmp_path / "widened")
    assert fingerprint(open_checkpoint(tmp_path / "half")) == fingerprint(open_checkpoint(tmp_path / "widened"))


def test_formats_are_detected_and_misunderstandings_named(tiny, tiny_meta, tiny_adapter, tmp_path):
    assert detect_format(tiny[0]) == "hf"
    assert detect_format(tiny_meta) == "meta"
    for path, words in (
        (tmp_path / "absent", "no such model directory"),
        (tiny[0] / "model.safetensors", "a file where a model directory"),
        (tiny_adapter, "an adapter, not a model"),
        (tmp_path, "neither config.json"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)


def test_a_configuration_alone_can_be_read(tiny, tiny_meta, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny[0] / "config.json").read_bytes())
    assert read_config(tmp_path).hidden_size == 32
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_bytes((tiny_meta / "params.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"vocab_size is -1"):
        read_config(meta)


def test_fixture_model_in_both_formats(shared_fixtures):
    hf, meta = (open_checkpoint(shared_fixtures / f"stories260K-{name}") for name in ("hf", "meta"))
    assert fingerprint(hf) == fingerprint(meta)
    assert all(torch.equal(hf.tensor(name), meta.tensor(name)) for name in hf.shapes)
    judge = LlamaForCausalLM.from_pretrained(hf.path)
    tokens = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        for checkpoint in (hf, meta):
            torch.testing.assert_close(load_model(checkpoint)(tokens), judge(tokens).logits, rtol=1e-4, atol=1e-4)
