"""Nothing that is read can run code, hang, or fill the memory; each fault is one line that names it, exit code 4."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.formats.torch_archive import read_archive

from .conftest import save_meta, save_tiny


class Payload:
    """What an attacker pickles: unpickling it would create ``marker``."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w').close()",)


def refused(path, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.fixture
def meta(tiny, tmp_path):
    return save_meta(tmp_path / "meta", tiny[1])


@pytest.fixture
def hf(tmp_path):
    save_tiny(tmp_path / "hf")
    return tmp_path / "hf"


def state_of(meta):
    return torch.load(meta / "consolidated.00.pth", weights_only=True)


# --- pickles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["zip", "legacy", "raw"])
def test_malicious_pickle_is_refused_by_name_and_not_run(meta, tmp_path, layout):
    marker = tmp_path / "ran"
    content = {**state_of(meta), "evil": Payload(marker)}
    target = meta / "consolidated.00.pth"
    if layout == "raw":
        target.write_bytes(pickle.dumps(content["evil"], protocol=2))
    else:
        torch.save(content, target, _use_new_zipfile_serialization=layout == "zip")
    refused(meta, "exec", "consolidated.00.pth")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_pickle_protocol_of_a_payload_is_refused(tmp_path, protocol):
    marker = tmp_path / "ran"
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Payload(marker)}, protocol=protocol))
    with pytest.raises(CheckpointError) as caught:
        read_archive(path)
    assert "exec" in str(caught.value) or "opcode" in str(caught.value)
    assert not marker.exists()


def test_tar_format_is_refused(meta):
    with tarfile.open(meta / "consolidated.00.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(meta, "tar")


def test_object_that_is_no_dictionary_of_tensors(meta):
    for content, word in (
        ([1, 2], "opcode"), ({"a": 3}, "not a tensor"), ({"model": state_of(meta)}, "not a tensor"),
        ({1: torch.zeros(2)}, "no string"), (torch.zeros(2), "something other"),
    ):  # fmt: skip
        torch.save(content, meta / "consolidated.00.pth")
        refused(meta, word)


def test_integer_and_sparse_tensors_are_refused_by_name(meta):
    torch.save({"a": torch.zeros(3, dtype=torch.int64)}, meta / "consolidated.00.pth")
    refused(meta, "torch.LongStorage")
    torch.save({"a": torch.eye(3).to_sparse()}, meta / "consolidated.00.pth")
    refused(meta, "_rebuild_sparse_tensor")


def test_state_dicts_and_parameters_are_plain_enough(tiny, meta):
    module = torch.nn.Module()
    for name, weight in state_of(meta).items():
        module.register_parameter(name.replace(".", "/"), torch.nn.Parameter(weight))
    for as_parameters in (True, False):
        held = dict(module.named_parameters()) if as_parameters else module.state_dict()
        renamed = type(held)((name.replace("/", "."), weight) for name, weight in held.items())
        torch.save(renamed, meta / "consolidated.00.pth")
        checkpoint = open_checkpoint(meta)
        assert torch.equal(checkpoint.tensor("model.norm.weight"), tiny[1].state_dict()["model.norm.weight"])
    torch.save(torch.nn.Linear(3, 2).state_dict(), meta / "x.pth")  # an OrderedDict with _metadata
    assert sorted(read_archive(meta / "x.pth")) == ["bias", "weight"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_is_read(tiny, meta, protocol):
    torch.save(state_of(meta), meta / "consolidated.00.pth", pickle_protocol=protocol)
    assert torch.equal(open_checkpoint(meta).tensor("lm_head.weight"), tiny[1].state_dict()["lm_head.weight"])


def test_tensor_with_a_negative_bit_is_refused(meta):
    state = state_of(meta)
    state["norm.weight"] = torch._neg_view(state["norm.weight"])
    torch.save(state, meta / "consolidated.00.pth")
    refused(meta, "a call that plain tensors do not need")


def test_pickle_memo_and_number_bombs_allocate_nothing(tmp_path):
    bombs = {
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "number": b"\x80\x02}\x8a\xff" + b"\xff" * 255 + b".",
        "nesting": b"\x80\x02" + b")" + b"\x85" * 100_000 + b".",
        "empty": b"",
        "no stop": b"\x80\x02}",
        "stack": b"\x80\x02" + b"u" * 10,
        "length": b"\x80\x02X\xff\xff\xff\x7fabc.",
    }
    for name, bomb in bombs.items():
        path = tmp_path / f"{name}.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", bomb)
        tracemalloc.start()
        if name == "memo":
            assert read_archive(path) == {}
        else:
            with pytest.raises(CheckpointError):
                read_archive(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400e6, name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damaged_byte_is_an_error_of_ours_or_harmless(tiny_meta, tmp_path, position, byte, cut):
    data = bytearray((tiny_meta / "consolidated.00.pth").read_bytes())
    at = int(position * (len(data) - 1))
    if cut:
        del data[at:]
    else:
        data[at] = byte
    (tmp_path / "x.pth").write_bytes(data)
    try:
        for entry in read_archive(tmp_path / "x.pth").values():
            assert 0 <= entry.begin <= entry.end <= len(data)
    except LlamatuneError as fault:
        assert fault.exit_code == 4


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damaged_pickle_is_an_error_of_ours_or_harmless(tiny_meta, tmp_path, edits):
    with zipfile.ZipFile(tiny_meta / "consolidated.00.pth") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    pickled = bytearray(records[name])
    for position, byte in edits:
        pickled[int(position * (len(pickled) - 1))] = byte
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for other, data in {**records, name: bytes(pickled)}.items():
            archive.writestr(other, data)
    size = (tmp_path / "x.pth").stat().st_size
    try:
        for entry in read_archive(tmp_path / "x.pth").values():
            assert 0 <= entry.begin <= entry.end <= size
    except LlamatuneError as fault:
        assert fault.exit_code == 4


# --- zip archives ------------------------------------------------------------------------------------------------


def rewritten(meta, change):
    """The archive again, record by record, with ``change(name, data) -> (data, compression)``."""
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            data, compression = change(name, data)
            archive.writestr(name, data, compress_type=compression)


def test_deflated_record_bomb(meta):
    rewritten(meta, lambda name, data: (data, zipfile.ZIP_DEFLATED if name.endswith("/data/0") else zipfile.ZIP_STORED))
    refused(meta, "compressed")
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 200_000_000)
    assert path.stat().st_size < 1_000_000
    refused(meta, "compressed")


def test_short_storage(meta):
    rewritten(meta, lambda name, data: (data[:-8] if name.endswith("/data/0") else data, zipfile.ZIP_STORED))
    refused(meta, "larger than its storage")


def test_missing_record(meta):
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            if not name.endswith("/data/3"):
                archive.writestr(name, data)
    refused(meta, "no data record")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_records(meta):
    with zipfile.ZipFile(meta / "consolidated.00.pth", "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    refused(meta, "twice")


def test_overlapping_records(meta):
    """Two entries of the directory that point at one local header, as zip bombs do."""
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", b"\0" * 64)
        copy = zipfile.ZipInfo("x/data/1")
        original = archive.getinfo("x/data/0")
        copy.header_offset, copy.CRC = original.header_offset, original.CRC
        copy.compress_size = copy.file_size = 64
        archive.filelist.append(copy)
    refused(meta, "overlaps")


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(1).expand(32, 32),
        torch.zeros(32, 1).expand(32, 32),
        torch.zeros(1, 32).expand(32, 32),
        torch.zeros(63).as_strided((32, 32), (1, 1)),
        torch.zeros(1023).as_strided((32, 32), (31, 1)),
        torch.zeros(1023).as_strided((32, 32), (1, 31)),
    ],
)
def test_tensors_whose_own_elements_overlap(meta, view):
    state = state_of(meta)
    state["layers.0.attention.wq.weight"] = view
    torch.save(state, meta / "consolidated.00.pth")
    refused(meta, "elements overlap")


def strides_of_wq(meta, old, new):
    """The pickle again, with other strides for the first tensor that has the strides ``old``."""

    def change(name, data):
        if name.endswith("data.pkl"):
            assert old in data
            data = data.replace(old, new, 1)
        return data, zipfile.ZIP_STORED

    rewritten(meta, change)


def test_views_that_leave_their_storage_or_run_backwards(meta):
    state = state_of(meta)
    state["layers.0.attention.wq.weight"] = torch.zeros(32, 77)[:, :32]
    torch.save(state, meta / "consolidated.00.pth")
    assert open_checkpoint(meta).shapes
    wide = b"K\x4dK\x01\x86"  # the tuple (77, 1), as protocol 2 writes it
    strides_of_wq(meta, wide, b"K\x4eK\x01\x86")
    assert open_checkpoint(meta).shapes, "31 * 78 + 32 elements are still in the storage of 32 * 77"
    strides_of_wq(meta, b"K\x4eK\x01\x86", b"K\xffK\x01\x86")
    refused(meta, "layers.0.attention.wq.weight of shape [32, 32] is larger than its storage")
    strides_of_wq(meta, b"K\xffK\x01\x86", b"J\xff\xff\xff\xffK\x01\x86")
    refused(meta, "impossible sizes")


def test_interleaved_views_of_one_storage_are_refused(meta):
    """They would share no byte; but their extents cross, and telling such files from a bomb's is not worth it."""
    state = state_of(meta)
    both = torch.randn(32, 64)
    state["layers.0.attention.wq.weight"], state["layers.1.attention.wq.weight"] = both[:, :32], both[:, 32:]
    torch.save(state, meta / "consolidated.00.pth")
    refused(meta, "share bytes")


def test_tensors_that_overlap(meta):
    state = state_of(meta)
    shared = torch.randn(33, 32)
    state["layers.0.attention.wq.weight"], state["layers.1.attention.wq.weight"] = shared[:32], shared[1:]
    torch.save(state, meta / "consolidated.00.pth")
    refused(meta, "share bytes", "layers.0.attention.wq.weight")


def test_truncated_archive(meta):
    path = meta / "consolidated.00.pth"
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 3, 0):
        path.write_bytes(data[:size])
        refused(meta, "consolidated.00.pth")


def test_trailing_bytes_after_the_archive(meta):
    with (meta / "consolidated.00.pth").open("ab") as file:
        file.write(b"more")
    refused(meta, "cut short or extended")


def test_missing_shard_in_the_middle(tiny, tmp_path):
    path = save_meta(tmp_path / "m", tiny[1], shards=2)
    (path / "consolidated.01.pth").rename(path / "consolidated.02.pth")
    refused(path, "consolidated.01.pth is missing")


# --- safetensors -------------------------------------------------------------------------------------------------


def with_index(path, change):
    save_tiny(path, shard="20KB")
    index = path / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    change(facts["weight_map"])
    index.write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "sub/../../x.safetensors", ".hidden.safetensors", "x.bin", "", 3, None],
)
def test_index_traversal(tmp_path, shard):
    path = with_index(tmp_path / "m", lambda names: names.update({"model.norm.weight": shard}))
    refused(path, "unsafe shard name", "model.norm.weight")


def test_huggingface_cache_symlinks_are_legal(hf, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(hf.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert open_checkpoint(hf).shapes


def test_dangling_symlink(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(hf, "no such file")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_fifo_does_not_hang_huggingface(hf, file):
    (hf / file).unlink(missing_ok=True)
    os.mkfifo(hf / file)
    refused(hf, "not a regular file", file)


@pytest.mark.parametrize("file", ["consolidated.00.pth", "params.json"])
def test_fifo_does_not_hang_meta(meta, file):
    (meta / file).unlink()
    os.mkfifo(meta / file)
    refused(meta, "not a regular file", file)


def test_endless_device(hf):
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to("/dev/zero")
    refused(hf, "not a regular file")


def test_truncated_safetensors_tells_both_sizes(hf):
    path = hf / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    refused(hf, f"{len(data) - 10:,}", f"{len(data):,}")
    path.write_bytes(data + b"1234")
    refused(hf, f"{len(data) + 4:,}", f"{len(data):,}")
    path.write_bytes(b"")
    refused(hf, "0 bytes")


@pytest.mark.parametrize("file", ["model.safetensors", "consolidated.00.pth"])
def test_lfs_pointer_and_html_page(hf, meta, file):
    directory = hf if file == "model.safetensors" else meta
    (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476925163\n")
    refused(directory, "git-lfs pointer")
    (directory / file).write_text("<!DOCTYPE html><html>" + "x" * 500)
    refused(directory, "HTML page")


def test_header_bombs(hf):
    path = hf / "model.safetensors"
    for header in (
        b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[1099511627776,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":1}',
        b"[]",
        b"{",
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(hf)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(hf)


def test_only_pickled_huggingface_weights(hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin", "not a PyTorch zip file")
    torch.save({"model.norm.weight": torch.ones(3)}, hf / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(hf, "pytorch_model.bin", "can run code")
    shard, marker = "pytorch_model-00001-of-00001.bin", tmp_path / "marker"
    for file in ("pytorch_model.bin", shard):
        torch.save({"model.norm.weight": Payload(marker)}, hf / file)
        refused(hf, file)
        (hf / "pytorch_model.bin").unlink(missing_ok=True)
        (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert not marker.exists()


def test_no_weights_at_all(hf, meta):
    (hf / "model.safetensors").unlink()
    refused(hf, "no weights")
    (meta / "consolidated.00.pth").unlink()
    refused(meta, "no weights")


def test_shards_without_an_index(tmp_path):
    save_tiny(tmp_path / "m", shard="20KB")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    refused(tmp_path / "m", "no model.safetensors.index.json")


def test_index_that_disagrees_with_its_shards_a8(tmp_path):
    moved = with_index(tmp_path / "a", lambda names: names.update({"model.norm.weight": names["lm_head.weight"]}))
    (moved / "model.safetensors").unlink(missing_ok=True)
    refused(moved, "model.norm.weight", "index")
    unlisted = with_index(tmp_path / "b", lambda names: names.pop("model.norm.weight"))
    refused(unlisted, "not in the index: model.norm.weight")
    invented = with_index(tmp_path / "c", lambda names: names.update(extra=names["lm_head.weight"]))
    refused(invented, "not in its shard: extra")
    gone = with_index(tmp_path / "d", lambda names: None)
    sorted(gone.glob("model-*.safetensors"))[1].unlink()
    refused(gone, "no such file", "model-00002")


# --- tensors and configuration -----------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_a3(hf, meta):
    weights = load_file(hf / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(31)
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    refused(
        hf, "missing: model.layers.1.mlp.up_proj.weight", "unexpected: model.layers.2.mlp.up_proj.weight",
        "wrong shape: model.norm.weight [31] instead of [32]",
    )  # fmt: skip
    state = state_of(meta)
    del state["layers.1.feed_forward.w3.weight"]
    state["lora"] = torch.zeros(2)
    torch.save(state, meta / "consolidated.00.pth")
    refused(meta, "missing: layers.1.feed_forward.w3.weight", "unexpected: lora")


def test_many_missing_tensors_make_a_short_message(hf):
    save_file({"model.embed_tokens.weight": torch.zeros(96, 32), "lm_head.weight": torch.zeros(96, 32)},
              hf / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert len(refused(hf, "and 14 more")) < 1000


def test_missing_head_of_an_untied_model(hf):
    weights = load_file(hf / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    refused(hf, "lm_head.weight is missing", "tie_word_embeddings is false", "fetch the weights again")


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_other_models_of_a_family_are_named(tmp_path, kind, family):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, num_key_value_heads=1, vocab_size=32)
    model = getattr(transformers, kind).from_config(config)
    model.save_pretrained(tmp_path)
    head = {"llama": "Llama", "mistral": "Mistral"}.get(family, family.capitalize()) + "ForCausalLM"
    refused(tmp_path, f'architectures is ["{type(model).__name__}"]', f"lm_head.weight is missing; give a {head}")


def test_quantised_dtypes_are_refused(hf):
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(88, 32, dtype=torch.int8)
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    refused(hf, "model.layers.0.mlp.up_proj.weight I8")


CHANGES = [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_scaling": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}}, "rope_type is llama3"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' has no factor"),
    ({"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "rope_parameters.type is linear"),
    ({"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": "5e5"}}, "rope_theta is '5e5'"),
    ({"rope_scaling": {"rope_theta": -1.0}, "rope_parameters": None}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"attention_bias": True}, "missing: model.layers.0.self_attn.q_proj.bias"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"mlp_bias": True}, "missing: model.layers.0.mlp.gate_proj.bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "gemma"}, "uses GELU; supported are llama"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window"),
    ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, "in some layers only"),
    ({"layer_types": ["sliding_attention", "sliding_attention"]}, "this model has no window"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention", "sliding_attention"]}, "this model has no window"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "max_window_layers"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    ({"hidden_size": 1 << 40}, "hidden_size"),
    ({"vocab_size": 1 << 31}, "vocab_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": -4}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": 1e999}, ""),
    ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"eos_token_id": ["2"]}, "eos_token_id"),
    ({"head_dim": 7}, "head_dim"),
    ({"intermediate_size": None}, "intermediate_size"),
]


@pytest.mark.parametrize(("change", "word"), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_configurations_that_compute_something_else(hf, change, word):
    facts = json.loads((hf / "config.json").read_text())
    (hf / "generation_config.json").unlink(missing_ok=True)
    (hf / "config.json").write_text(json.dumps({**facts, **change}))
    refused(hf, word)


@pytest.mark.parametrize(
    "text", ["NaN", '{"a": 1, "a": 2}', "[]", "", "{", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"]
)
def test_broken_json(hf, text):
    (hf / "config.json").write_text(text)
    refused(hf, "config.json")


META_CHANGES = [
    ({"use_scaled_rope": "yes"}, "use_scaled_rope"),
    ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, "factor of the rope type 'llama3' is 0.5"),
    ({"sliding_window": -3}, "sliding_window"),
    ({"multiple_of": 0}, "multiple_of"),
    ({"dim": 1 << 60}, "dim"),
    ({"ffn_dim_multiplier": 1e30}, "ffn_dim_multiplier"),
    ({"n_layers": True}, "n_layers"),
    ({"multiple_of": 256}, "wrong shape: layers.0.feed_forward.w1.weight [88, 32] instead of [256, 32]"),
    ({"vocab_size": 95}, "tok_embeddings.weight [96, 32] instead of [95, 32]"),
    ({"norm_eps": None, "n_heads": None}, "n_heads"),
]


@pytest.mark.parametrize(("change", "word"), META_CHANGES, ids=[str(i) for i in range(len(META_CHANGES))])
def test_meta_parameters_that_contradict_the_weights_a10(meta, change, word):
    facts = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**facts, **change}))
    refused(meta, word)


def test_vocabulary_of_minus_one_without_weights_comes_from_the_tokenizer(meta, shared_fixtures):
    (meta / "consolidated.00.pth").unlink()
    (meta / "tokenizer.model").write_bytes((shared_fixtures / "data" / "llama2_tokenizer.model").read_bytes())
    assert read_config(meta).vocab_size == 32000
