"""A GGUF file is hostile until its header is checked: each fault is one line and exit code 4; nothing is allocated."""

from __future__ import annotations

import random
import re
import resource
import shutil
import struct

import gguf
import pytest
import torch

from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.gguf_config import read_gguf_config
from llamatune.checkpoints.gguf_model import GgufCheckpoint
from llamatune.command_options.conversion import ConvertOptions
from llamatune.errors import CheckpointError
from llamatune.formats.gguf import BLOCKS, TYPES, read_gguf, write_gguf
from llamatune.safe_reading import digest_file
from llamatune.tokenizers.gguf_rebuilt import write_tokenizer


@pytest.fixture(scope="module")
def sound(tiny_base, tokenizer_models, tmp_path_factory):
    """The bytes of a file with every kind of entry."""
    folder = tmp_path_factory.mktemp("gguf")
    base = tiny_base(torch.bfloat16, vocab_size=600)
    (folder / "base").mkdir()
    for file in base.iterdir():
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    (folder / "base" / "tokenizer.model").write_bytes(tokenizer_models["bpe"].read_bytes())
    convert(ConvertOptions(folder / "base", folder / "model.gguf"))
    return (folder / "model.gguf").read_bytes()


def refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as fault:
        GgufCheckpoint.open(tmp_path / "model.gguf")
    assert "\n" not in str(fault.value)
    return str(fault.value)


def replaced(content, old, new):
    assert content.count(old) == 1
    return content.replace(old, new)


def number_after(content, key, value, kind="<I"):
    """The same file with another value of a scalar entry."""
    place = content.index(key.encode()) + len(key) + 4
    return content[:place] + struct.pack(kind, value) + content[place + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("place", "kind", "value", "why"),
    [
        (4, "<I", 1, "version 1"),
        (4, ">I", 3, "big-endian"),
        (4, "<I", 4, "version 4"),
        (8, "<Q", 1 << 63, "a count of 9,223"),
        (8, "<Q", 30 + 1, "declared where|dimensions|unknown|not UTF-8|a count"),
        (16, "<Q", 1 << 40, "a count of 1,099"),
        (24, "<Q", 1 << 62, "a count of"),
        (24, "<Q", (1 << 24) - 1, "bytes are declared where at most"),
    ],
)
def test_counts_and_lengths_are_compared_with_what_is_left(sound, tmp_path, place, kind, value, why):
    content = sound[:place] + struct.pack(kind, value) + sound[place + struct.calcsize(kind) :]
    assert re.search(why, refused(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty", b"", "not a GGUF file"),
        ("other", b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        ("page", b"<!doctype html><p>log in", "HTML page"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("magic alone", b"GGUF", "broken GGUF header"),
    ],
)
def test_other_files(tmp_path, name, content, why):
    assert why in refused(tmp_path, content)


def test_cut_and_extended_files(sound, tmp_path):
    for size in (5, 23, 24, 1000, len(sound) // 2, len(sound) - 1):
        refused(tmp_path, sound[:size])
    refused(tmp_path, sound + bytes(64))


def test_a_key_or_a_tensor_twice(sound, tmp_path):
    twice = replaced(sound, b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id")
    assert "the key 'tokenizer.ggml.eos_token_id' appears twice" in refused(tmp_path, twice)
    double = replaced(sound, b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")
    assert "two tensors are called blk.0.attn_q.weight" in refused(tmp_path, double)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("llama.block_count", 1 << 31, "num_hidden_layers is"),
        ("llama.block_count", 0, "num_hidden_layers is 0"),
        ("llama.block_count", 4, "missing: blk.3"),
        ("llama.block_count", 2, "unexpected: blk.2"),
        ("llama.attention.head_count", 0, "num_attention_heads is 0"),
        ("llama.attention.head_count", 1 << 24, "num_attention_heads|no multiple|fit"),
        ("llama.attention.key_length", 0, "head_dim|value_length"),
        ("llama.embedding_length", 47, "wrong shape"),
        ("llama.context_length", 0, "max_position_embeddings is 0"),
        ("llama.rope.dimension_count", 4, "rope.dimension_count"),
    ],
)
def test_metadata_that_contradicts_the_tensors(sound, tmp_path, key, value, why):
    assert re.search(why, refused(tmp_path, number_after(sound, key, value)))


def test_other_architectures_kinds_and_parts_are_refused_by_name(tmp_path):
    def file_with(**entries):
        metadata = {key.replace("__", "."): value for key, value in entries.items()}
        with (tmp_path / "made.gguf").open("wb") as file:
            write_gguf(file, metadata, [("token_embd.weight", "F32", (2, 32))], [[bytes(256)]])
        return refused(tmp_path, (tmp_path / "made.gguf").read_bytes())

    assert "'gemma3'" in file_with(general__architecture=("str", "gemma3"))
    assert "convert-adapter" in file_with(general__architecture=("str", "llama"), general__type=("str", "adapter"))
    assert "gguf-split" in file_with(general__architecture=("str", "llama"), split__count=("u16", 3))
    assert "expert_count" in file_with(general__architecture=("str", "llama"), llama__expert_count=("u32", 8))
    assert "general.architecture" in file_with(general__architecture=("u32", 1))
    assert "alignment" in file_with(general__alignment=("u32", 3))


@pytest.mark.parametrize("shift", [1, 32, -32, 1 << 40])
def test_offsets_that_overlap_leave_a_gap_or_leave_the_file(sound, tmp_path, shift):
    place = sound.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight") + 4 + 2 * 8 + 4
    (offset,) = struct.unpack_from("<Q", sound, place)
    moved = sound[:place] + struct.pack("<Q", (offset + shift) % (1 << 64)) + sound[place + 8 :]
    assert "overlaps another one or leaves a gap" in refused(tmp_path, moved)


@pytest.mark.parametrize("value", [1 << 39, 1 << 62, 0])
def test_impossible_dimensions(sound, tmp_path, value):
    place = sound.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight") + 4
    refused(tmp_path, sound[:place] + struct.pack("<Q", value) + sound[place + 8 :])


def test_mutated_headers_neither_crash_nor_allocate(sound, tmp_path):
    """600 headers with a few bytes changed: refused, or still sound; memory stays what it was."""
    chance, refusals = random.Random(5), 0
    header = sound.index(b"output_norm.weight") + 40
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "model.gguf"
    for number in range(600):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(header if number % 3 else 200)
            content[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(content)
        try:
            GgufCheckpoint.open(path)
        except CheckpointError as fault:
            refusals += 1
            assert "\n" not in str(fault)
    assert refusals > 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_a_tokenizer_in_the_file_is_checked_too(sound, tmp_path, command):
    place = sound.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4
    (tmp_path / "model.gguf").write_bytes(sound[:place] + struct.pack("<I", 100_000) + sound[place + 4 :])
    done = command("convert", "--model", tmp_path / "model.gguf", "--output", tmp_path / "out")
    assert (done.code, done.stderr.count("\n")) == (4, 1)
    assert "eos_token_id is 100000" in done.stderr
    kinds = sound.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4 + 4 + 8
    (tmp_path / "model.gguf").write_bytes(sound[:kinds] + struct.pack("<i", 9) + sound[kinds + 4 :])
    done = command("convert", "--model", tmp_path / "model.gguf", "--output", tmp_path / "out")
    assert (done.code, "token_type" in done.stderr) == (4, True)


def test_types_are_those_of_the_package_gguf():
    for number, (name, values, size) in TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert (known.name, gguf.GGML_QUANT_SIZES[known]) == (name, (values, size))
    assert set(BLOCKS) <= {known.name for known in gguf.GGMLQuantizationType}


def test_every_kind_of_entry_comes_back(tmp_path):
    entries = {
        "a.u8": ("u8", 255), "a.i8": ("i8", -128), "a.u16": ("u16", 65535), "a.i16": ("i16", -1), "a.u32": ("u32", 7),
        "a.i32": ("i32", -7), "a.f32": ("f32", 1e-5), "a.bool": ("bool", True), "a.str": ("str", "é日🦙"),
        "a.u64": ("u64", 1 << 63), "a.i64": ("i64", -(1 << 62)), "a.f64": ("f64", 0.1), "b.str": ("[str]", ["", "x"]),
        "b.i32": ("[i32]", [1, -1]), "b.f32": ("[f32]", [0.5, -2.0]), "b.bool": ("[bool]", [True, False]),
        "b.none": ("[u8]", []), "big.f32": ("f32", 3.4028235e38), "no.f32": ("f32", float("inf")),
    }  # fmt: skip
    with (tmp_path / "x.gguf").open("wb") as file:
        digest = write_gguf(file, entries, [("t", "F16", (3, 5)), ("v", "F32", (2,))], [[bytes(30)], [bytes(8)]])
    header = read_gguf(tmp_path / "x.gguf")
    assert dict(header.entries) == entries
    assert {name: part.shape for name, part in header.tensors.items()} == {"t": (3, 5), "v": (2,)}
    assert digest == digest_file(tmp_path / "x.gguf")


ODD = [
    ("u32", 0), ("u64", (1 << 64) - 1), ("i64", -1), ("f32", float("nan")), ("f32", float("inf")), ("f32", -1.0),
    ("f32", 0.0), ("f64", 1e300), ("bool", True), ("str", ""), ("str", "{% x"), ("str", "\0\n\u202e"), ("[str]", []),
    ("[str]", ["a b", "\0"]),
    ("[u32]", [1, 2]), ("[f32]", [float("nan")]), ("[u8]", [0] * 9), ("[i32]", [-5]),
]  # fmt: skip
KEYS = [
    *(f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "attn_factor")),
    *(f"llama.rope.scaling.yarn_beta_{key}" for key in ("fast", "slow")),
    "llama.attention.sliding_window", "llama.expert_count", "general.type", "split.count", "tokenizer.chat_templates",
    "tokenizer.chat_template.x", "tokenizer.ggml.merges", "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_eos_token",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scaled"), [("llama", "none"), ("gpt2", "llama3"), ("none", "yarn")])
def test_any_value_under_any_key_is_refused_or_read(sound, tmp_path, kind, scaled, monkeypatch):
    """About 800 headers each of the right form, with a value that has no sense or another type."""
    monkeypatch.setattr("llamatune.tokenizers.gguf_rebuilt.load_tokenizer", lambda path: None)  # tested elsewhere
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    (tmp_path / "sound.gguf").write_bytes(sound)
    header = read_gguf(tmp_path / "sound.gguf")
    entries = dict(header.entries) | {"tokenizer.ggml.model": ("str", kind)}
    if kind == "gpt2":
        entries |= {"tokenizer.ggml.pre": ("str", "smollm"), "tokenizer.ggml.merges": ("[str]", ["a b"])}
    if scaled == "yarn":
        entries |= {"llama.rope.scaling.type": ("str", "yarn"), "llama.rope.scaling.factor": ("f32", 4.0)}
        entries["llama.rope.scaling.original_context_length"] = ("u32", 64)
    shapes, refusals = {name: part.shape for name, part in header.tensors.items()}, 0
    factors = [1.0, 2.0, 8.0, 8.0] if scaled == "llama3" else None
    for key in dict.fromkeys([*entries, *KEYS]):
        for value in ODD:
            changed = {name: value for name, (_, value) in (entries | {key: value}).items()}
            (made := tmp_path / "made").mkdir()
            try:
                read_gguf_config(changed, shapes, factors, tmp_path / "model.gguf")
                if key.startswith("tokenizer"):
                    write_tokenizer(changed, made, tmp_path / "model.gguf")
            except CheckpointError as fault:
                refusals += 1
                assert "\n" not in str(fault)
            shutil.rmtree(made)
    assert refusals > 200
