"""``convert``: what comes back is what was there, byte for byte, and other programs read the same from it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.gguf_config import gguf_name
from llamatune.checkpoints.gguf_model import GgufCheckpoint
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.conversion import ConvertOptions
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError, Stopped
from llamatune.events import Notice, Progress
from llamatune.formats.gguf import read_gguf, write_gguf
from llamatune.formats.manifest import verify_product
from llamatune.model.rope import rotary_angles
from llamatune.safe_reading import digest_file

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
EVEN = {"vocab_size": 132, "num_attention_heads": 4, "head_dim": 12}
"""What two of Meta's shards divide."""
FAMILY = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "llama 3": {"rope_parameters": LLAMA_3, "max_position_embeddings": 131072},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral's window": {"model_type": "mistral", "sliding_window": 64},
    "linear": {"rope_parameters": LINEAR},
    "yarn": {"rope_parameters": YARN},
    "yarn, own factors": {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of attention": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
}
TO_META = ("llama", "tied", "llama 3")
TOKENS = torch.randint(0, 131, (1, 23), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def bare_base(tiny_base, tmp_path_factory):
    """A model without a tokenizer: that of ``tiny_base`` normalises text by a table of 240,000 numbers."""
    made = {}

    def make(**changes):
        if (key := repr(changes)) not in made:
            made[key] = tmp_path_factory.mktemp("bare") / "base"
            shutil.copytree(tiny_base(**changes), made[key], ignore=shutil.ignore_patterns("tokenizer.model"))
        return made[key]

    return make


def converted(source, output, **options):
    events: list[object] = []
    report = convert(ConvertOptions(source, output, **options), events.append)
    return report, [event.message for event in events if isinstance(event, Notice)]


def weights(path):
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bytes(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, W in one.items():
        assert W.dtype == other[name].dtype, name
        assert W.view(torch.uint8).equal(other[name].view(torch.uint8)), name


def assert_same_model(one, other):
    """Configurations that compute the same, though the scaling of rope may be spelled in another way."""
    ours, theirs = read_config(one), read_config(other)
    angles = [rotary_angles(torch.arange(200)[None], c.head_dim, c.rope_theta, c.rope_scaling) for c in (ours, theirs)]
    torch.testing.assert_close(*angles)
    same = {"rope_scaling": None, "model_type": "", "eos_token_ids": ()}
    assert dataclasses.replace(ours, **same) == dataclasses.replace(theirs, **same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("member", FAMILY)
def test_a_model_comes_back_from_gguf_byte_for_byte(bare_base, tmp_path, member, dtype):
    if dtype == torch.float16 and member not in ("llama", "qwen2"):
        pytest.skip("one of each architecture is enough")
    base = bare_base(dtype=dtype, **FAMILY[member])
    converted(base, tmp_path / "model.gguf")
    converted(tmp_path / "model.gguf", tmp_path / "back", shards=3)
    assert_same_bytes(base, tmp_path / "back")
    assert_same_model(base, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("member", TO_META)
def test_a_model_comes_back_from_metas_format_byte_for_byte(bare_base, tmp_path, member, shards, dtype):
    base = bare_base(dtype=dtype, **FAMILY[member], **EVEN)
    converted(base, tmp_path / "meta", format="meta", shards=shards)
    assert len(list((tmp_path / "meta").glob("*.pth"))) == shards
    converted(tmp_path / "meta", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same_bytes(base, tmp_path / "back")
    assert_same_model(base, tmp_path / "back")
    converted(tmp_path / "meta", tmp_path / "meta.gguf")
    converted(tmp_path / "meta.gguf", tmp_path / "again", format="meta", shards=shards)
    files = (sorted((tmp_path / name).glob("*.pth")) for name in ("meta", "again"))
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("member", ["llama", "tied", "qwen2"])
def test_transformers_reads_the_same_model_from_the_gguf_file(bare_base, tmp_path, member):
    """Its reader of GGUF is another program. It knows neither scaled rope nor biases of llama nor Qwen3's head_dim."""
    base = bare_base(**FAMILY[member])
    converted(base, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, own(TOKENS).logits, atol=1e-4, rtol=0)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def test_the_package_gguf_reads_what_is_written(bare_base, tmp_path):
    base = bare_base(dtype=torch.bfloat16, **WIDE, **FAMILY["llama 3"])
    for dtype, kind in (("same", "BF16"), ("float32", "F32"), ("float16", "F16"), ("q8_0", "Q8_0")):
        report, _ = converted(base, tmp_path / f"{dtype}.gguf", dtype=dtype)
        assert report.sha256 == digest_file(tmp_path / f"{dtype}.gguf")
        reader = gguf.GGUFReader(tmp_path / f"{dtype}.gguf")
        facts = {name: field.contents() for name, field in reader.fields.items()}
        assert (facts["general.architecture"], facts["llama.rope.freq_base"]) == ("llama", 5e5)
        assert facts["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"]
        found = {tensor.name: tensor for tensor in reader.tensors}
        source = weights(base)
        for name, W in source.items():
            stored = found.pop(gguf_name(name))
            if W.dim() == 1:
                assert stored.tensor_type.name == "F32"
                assert stored.data.tolist() == W.tolist()
            elif "q_proj" not in name and "k_proj" not in name:
                assert stored.tensor_type.name == kind
                expected = gguf.quants.quantize(W.float().numpy(), gguf.GGMLQuantizationType[kind])
                assert stored.data.tobytes() == expected.tobytes(), name
        assert [*found] == ["rope_freqs.weight"]


def test_rows_of_q_are_interleaved_as_llama_cpp_has_them(bare_base, tmp_path):
    base = bare_base()
    converted(base, tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    q = weights(base)["model.layers.1.self_attn.q_proj.weight"]
    rows = torch.from_numpy(stored["blk.1.attn_q.weight"].data.copy())
    for head in range(6):
        for pair in range(4):
            assert rows[head * 8 + 2 * pair].equal(q[head * 8 + pair])
            assert rows[head * 8 + 2 * pair + 1].equal(q[head * 8 + 4 + pair])


def requantized(source, path, kind):
    """The same model with matrices in another type, by the package ``gguf``; and the values of one of them."""
    header, declared, data, kept = read_gguf(source), [], [], None
    for name, part in header.tensors.items():
        raw = source.read_bytes()[part.begin : part.end]
        if len(part.shape) == 2:
            W = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(part.shape).numpy()
            blocks = gguf.quants.quantize(W, gguf.GGMLQuantizationType[kind])
            if name == "blk.0.ffn_up.weight":
                kept = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
            raw = blocks.tobytes()
        declared.append((name, kind if len(part.shape) == 2 else part.dtype, part.shape))
        data.append([raw])
    with path.open("wb") as file:
        write_gguf(file, header.entries, declared, data)
    return kept


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"])
def test_quantised_weights_are_read_as_the_package_gguf_reads_them(bare_base, tmp_path, monkeypatch, kind):
    converted(bare_base(**WIDE), tmp_path / "model.gguf")
    if kind in ("IQ4_NL", "MXFP4"):
        pytest.importorskip("gguf")
        quants = gguf.quants._type_traits[gguf.GGMLQuantizationType[kind]]
        if "quantize_blocks" not in vars(quants):
            pytest.skip("the package does not quantise to it")
    expected = requantized(tmp_path / "model.gguf", tmp_path / "q.gguf", kind)
    _, notices = converted(tmp_path / "q.gguf", tmp_path / "back")
    assert any(f"weights in {kind} are read as fp32" in notice for notice in notices)
    got = weights(tmp_path / "back")["model.layers.0.mlp.up_proj.weight"]
    assert got.equal(expected)
    checkpoint, rows = GgufCheckpoint.open(tmp_path / "q.gguf"), [0, 7, 3, 47]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.rows(name, rows).equal(checkpoint.tensor(name)[rows])
    monkeypatch.setitem(sys.modules, "gguf", None)
    if kind != "Q8_0":
        with pytest.raises(EnvironmentFault, match=r"quantised as .* the package gguf: pip install gguf"):
            converted(tmp_path / "q.gguf", tmp_path / "other")
    else:
        converted(tmp_path / "q.gguf", tmp_path / "other")


def test_a_mixed_model_is_read_as_it_is_stored(bare_base, tmp_path):
    """Vectors in fp32 that 16 bits cannot hold stay in fp32."""
    base = tmp_path / "base"
    shutil.copytree(bare_base(dtype=torch.bfloat16), base)
    mixed = load_file(base / "model.safetensors")
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float() + 1e-5
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    converted(base, tmp_path / "model.gguf")
    converted(tmp_path / "model.gguf", tmp_path / "back")
    assert_same_bytes(base, tmp_path / "back")


@pytest.mark.parametrize(
    ("member", "target", "why"),
    [
        ("qwen2", "meta", "a bias in q_proj, k_proj, v_proj"),
        ("qwen3", "meta", "norms of the heads of q and k|head_dim 24"),
        ("biases", "meta", "a bias in"),
        ("mistral's window", "meta", "sliding_window"),
        ("linear", "meta", "rope type 'linear'"),
        ("yarn", "meta", "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "gguf", "'dynamic'"),
        ({"rope_parameters": {**LLAMA_3, "low_freq_factor": 2.0}, "head_dim": 64}, "gguf", "rope_freqs|rotary angles"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(bare_base, tmp_path, member, target, why):
    base = bare_base(**(FAMILY[member] if isinstance(member, str) else member))
    with pytest.raises(CheckpointError, match=why):
        converted(base, tmp_path / "out", format=target)
    assert not (tmp_path / "out").exists()


def test_a_window_that_llama_cpp_does_not_apply_is_told(bare_base, tmp_path):
    _, notices = converted(bare_base(**FAMILY["mistral's window"]), tmp_path / "model.gguf")
    assert any("does not apply its sliding window: texts beyond 64 tokens" in notice for notice in notices)
    assert GgufCheckpoint.open(tmp_path / "model.gguf").config.sliding_window == 64


def test_a_directory_is_a_product_and_is_made_once(bare_base, tmp_path):
    base = bare_base()
    for target in ("hf", "meta", "gguf"):
        output = tmp_path / target
        first, _ = converted(base, output, format=target, dtype="bfloat16")
        assert first.dtype == "bfloat16"
        assert verify_product(output).kind == "converted"
        again, _ = converted(base, output, format=target, dtype="bfloat16")
        assert again == dataclasses.replace(first, already_done=True)
        with pytest.raises(EnvironmentFault, match="holds something else"):
            converted(base, output, format=target, dtype="float16")
        converted(base, output, format=target, dtype="float16", overwrite=True)
    converted(tmp_path / "gguf", tmp_path / "of the only GGUF file in it")
    assert open_checkpoint(tmp_path / "of the only GGUF file in it").dtype("model.embed_tokens.weight") == torch.float16


def test_licences_and_card_go_along(bare_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bare_base(), base)
    for name in ("LICENSE.txt", "NOTICE", "README.md"):
        (base / name).write_text(f"of {name}")
    for target in ("hf", "meta", "gguf"):
        converted(base, tmp_path / target, format=target)
        for name in ("LICENSE.txt", "NOTICE", "README.md"):
            assert (tmp_path / target / name).read_text() == f"of {name}"


def test_a_variant_is_read_where_it_is_asked_for(bare_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bare_base(), base)
    half = {name: W.half() for name, W in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.fp16.safetensors", {"format": "pt"})
    report, _ = converted(base, tmp_path / "x.gguf", variant="fp16")
    assert report.dtype == "float16"
    with pytest.raises(SpecError, match="--variant is of Hugging Face"):
        converted(tmp_path / "x.gguf", tmp_path / "out", variant="fp16")


def test_facts_of_a_merge_are_carried(bare_base, tmp_path):
    base = tmp_path / "merged"
    shutil.copytree(bare_base(), base)
    facts = {"adapters": ["a" * 64], "template": {"name": "alpaca"}, "base_fingerprint": "sha256:0"}
    manifest = {"kind": "merged", "schema": 1, "inputs": {}, "facts": facts, "files": {}}
    manifest["files"] = {"config.json": {"bytes": 1, "sha256": "0" * 64}}
    (base / "llamatune.json").write_text(json.dumps(manifest))
    converted(base, tmp_path / "out")
    made = verify_product(tmp_path / "out").facts
    assert {key: made[key] for key in facts} == facts


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_shards_are_as_many_as_asked_for(bare_base, tmp_path, count):
    converted(bare_base(), tmp_path / "out", shards=count)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == count
    if count == 5:
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 2 * sum(sizes) / 5


def test_shards_that_cannot_be_are_refused(bare_base, tmp_path):
    base = bare_base()
    with pytest.raises(SpecError, match="--shards 999 for 30 tensors"):
        converted(base, tmp_path / "out", shards=999)
    with pytest.raises(SpecError, match=r"--shards 2 does not divide .*131"):
        converted(base, tmp_path / "out", format="meta", shards=2)
    with pytest.raises(SpecError, match="--shards 4 does not divide 2 key-value heads"):
        converted(base, tmp_path / "out", format="meta", shards=4)


@pytest.mark.parametrize(
    ("output", "options", "why"),
    [
        ("x.gguf", {"format": "hf"}, "a .gguf file and --format hf"),
        ("x", {"dtype": "q8_0"}, "of GGUF alone"),
        ("x.gguf", {"shards": 2}, "written whole"),
        ("x", {"format": "meta", "shard_bytes": 5}, "of hf alone"),
        ("x", {"shards": 2, "shard_bytes": 5}, "exclude each other"),
        ("x", {"format": "onnx"}, "hf, meta or gguf"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, output, options, why):
    with pytest.raises(SpecError, match=why):
        ConvertOptions(tmp_path / "model", tmp_path / output, **options)


def test_a_weight_beyond_the_dtype_is_refused(bare_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bare_base(dtype=torch.bfloat16), base)
    grown = {name: W * (1e9 if "up_proj" in name else 1) for name, W in load_file(base / "model.safetensors").items()}
    save_file(grown, base / "model.safetensors", {"format": "pt"})
    for output in ("out", "out.gguf"):
        with pytest.raises(CheckpointError, match=r"up_proj.* which float16 cannot hold"):
            converted(base, tmp_path / output, dtype="float16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("output", ["out", "meta", "out.gguf"])
def test_stopping_at_any_tensor_leaves_nothing(bare_base, tmp_path, output):
    base = bare_base()
    for stop_at in range(0, 30, 7):
        seen: list[object] = []
        with pytest.raises(Stopped):
            convert(
                ConvertOptions(base, tmp_path / output, format="meta" if output == "meta" else None),
                seen.append,
                lambda seen=seen, stop_at=stop_at: sum(isinstance(e, Progress) for e in seen) >= stop_at,
            )
        assert list(tmp_path.iterdir()) == []


def test_outputs_and_inputs_are_kept(bare_base, tmp_path, command):
    base = tmp_path / "base"
    shutil.copytree(bare_base(), base)
    assert command("convert", "--model", base, "--output", base, "--overwrite").code == 2
    done = command("convert", "--model", base, "--output", tmp_path / "x.gguf", "--json")
    assert (done.code, json.loads(done.stdout)["format"]) == (0, "gguf")
    taken = command("convert", "--model", base, "--output", tmp_path / "x.gguf")
    assert (taken.code, "--overwrite" in taken.stderr) == (5, True)
    assert command("convert", "--model", base, "--output", tmp_path / "x.gguf", "--overwrite").code == 0
    itself = command("convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "x.gguf", "--overwrite")
    assert (itself.code, "would replace --model" in itself.stderr) == (2, True)
    assert command("convert", "--model", tmp_path / "absent.gguf", "--output", tmp_path / "out").code == 4


def test_metas_format_tells_what_it_loses(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base(vocab_size=140, tie_word_embeddings=True), base)
    tokens = {str(n): {"content": f"<|x{n}|>", "special": True} for n in (120, 121)}
    pieces = read_config(base).vocab_size
    assert pieces == 140
    facts = {"added_tokens_decoder": tokens, "chat_template": "{{ messages }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(facts))
    _, notices = converted(base, tmp_path / "meta", format="meta")
    assert any("no place for the chat template" in notice for notice in notices)
    assert any("no place for '<|x120|>' and 1 more" in notice for notice in notices)
    _, notices = converted(tmp_path / "meta", tmp_path / "back")
    assert notices == [], "the head is there, and found to be the embedding"
    assert read_config(tmp_path / "back").tie_word_embeddings


def test_a_tokenizer_json_stays_in_metas_format(tiny_base, json_tokenizers, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base(vocab_size=600), base, ignore=shutil.ignore_patterns("tokenizer.model"))
    for file in json_tokenizers["smollm"].iterdir():
        shutil.copy(file, base)
    facts = json.loads((base / "config.json").read_text()) | {"eos_token_id": 2, "bos_token_id": 0}
    (base / "config.json").write_text(json.dumps(facts))
    (base / "generation_config.json").unlink(missing_ok=True)
    _, notices = converted(base, tmp_path / "meta", format="meta")
    assert any("no tokenizer.model, which Meta's format needs" in notice for notice in notices)
    converted(tmp_path / "meta", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_other_verbs_say_what_to_do_with_a_gguf_file(bare_base, tmp_path, command):
    converted(bare_base(), tmp_path / "model.gguf")
    for path in (tmp_path / "model.gguf", tmp_path):
        done = command("count-params", "--model", path)
        assert (done.code, "llamatune convert" in done.stderr) == (4, True)


def test_a_gguf_file_keeps_what_it_says_of_itself(bare_base, tmp_path):
    converted(bare_base(**WIDE), tmp_path / "model.gguf")
    header = read_gguf(tmp_path / "model.gguf")
    told = {"general.license": ("str", "apache-2.0"), "general.tags": ("[str]", ["x"]), "general.name": ("str", "Y")}
    data = ([(tmp_path / "model.gguf").read_bytes()[part.begin : part.end]] for part in header.tensors.values())
    with (tmp_path / "told.gguf").open("wb") as file:
        declared = [(name, part.dtype, part.shape) for name, part in header.tensors.items()]
        write_gguf(file, {**header.entries, **told}, declared, data)
    converted(tmp_path / "told.gguf", tmp_path / "q8.gguf", dtype="q8_0")
    entries = read_gguf(tmp_path / "q8.gguf").entries
    assert told.items() <= entries.items()
    assert entries["general.file_type"] == ("u32", 7)
    assert entries["llama.context_length"] == header.entries["llama.context_length"]


def test_a_weight_beyond_the_scale_of_q8_0_is_refused(bare_base, tmp_path):
    """Rows of 48 become F16, up to 65,504; rows of 64 Q8_0, whose scale is in fp16 too, up to 127 times as much."""
    for hidden, fits, beyond in ((48, 6e4, 1e5), (64, 8e6, 1e7)):
        base = tmp_path / f"base {hidden}"
        shutil.copytree(bare_base(hidden_size=hidden, num_attention_heads=4), base)
        for value in (fits, beyond):
            weights = load_file(base / "model.safetensors")
            weights["model.layers.1.mlp.up_proj.weight"][3, 4] = -value
            save_file(weights, base / "model.safetensors", {"format": "pt"})
            output = tmp_path / f"{hidden} {value:g}.gguf"
            if value == beyond:
                with pytest.raises(CheckpointError, match=r"up_proj.* which (F16|Q8_0) cannot hold"):
                    converted(base, output, dtype="q8_0")
                assert not output.exists()
                continue
            converted(base, output, dtype="q8_0")
            back = converted(output, tmp_path / f"back {hidden}", format="hf", dtype="float32")
            found = load_file(tmp_path / f"back {hidden}" / "model.safetensors")
            assert float(found["model.layers.1.mlp.up_proj.weight"][3, 4]) == pytest.approx(-value, rel=1e-2), back


def test_the_files_that_are_read_are_not_replaced(bare_base, tmp_path):
    """Weights in a directory to which a model's directory links, and the GGUF file of a directory that is given."""
    shutil.copytree(bare_base(), tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    converted(bare_base(), tmp_path / "gguf", format="gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    for model, output in ((tmp_path / "model", tmp_path / "blobs"), (tmp_path / "gguf", file)):
        with pytest.raises(SpecError, match="--output would replace --model"):
            converted(model, output, overwrite=True)
    assert (tmp_path / "blobs" / "config.json").exists()
