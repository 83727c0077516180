"""Merges copy what the adapter leaves as it is, and make the rest in portions: the same bytes as whole tensors give."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints import checkpoint as checkpoint_module
from llamatune.checkpoints import merged_weights
from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import ignore_event
from llamatune.formats.digested_file import writing_digested
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import Staging

from .conftest import save_meta, save_peft, save_tiny
from .test_views import save_views

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
LAYOUTS = ("one file", "shards", "bin", "fp64", "meta", "meta in 2", "meta views", "tied")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same model in every layout that a base may have, and an adapter for it."""
    root = tmp_path_factory.mktemp("bases")
    model = save_tiny(root / "one file", dtype=torch.bfloat16)
    save_tiny(root / "shards", dtype=torch.bfloat16, shard="20KB")
    save_tiny(root / "tied", dtype=torch.bfloat16, tied=True)
    for name in ("bin", "fp64"):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "one file" / "config.json").read_bytes())
    weights = load_file(root / "one file" / "model.safetensors")
    torch.save(weights, root / "bin" / "pytorch_model.bin")
    wide = {name: W.double() if "layers.0" in name else W for name, W in weights.items()}
    save_file(wide, root / "fp64" / "model.safetensors", {"format": "pt"})
    save_meta(root / "meta", model)
    save_meta(root / "meta in 2", model, shards=2)
    save_views(root / "meta views", model, 2, transposed=("wk.weight", "w2.weight"))
    save_peft(root / "adapter", root / "one file", TARGETS)
    save_peft(root / "adapter of tied", root / "tied", TARGETS)
    for name in ("adapter", "adapter of tied"):  # sums of such products are exact, in whatever order they are added
        file = root / name / "adapter_model.safetensors"
        save_file({key: (W * 64).round() / 64 for key, W in load_file(file).items()}, file, {"format": "pt"})
    return root


def adapter_of(bases, layout):
    return bases / ("adapter of tied" if layout == "tied" else "adapter")


def whole_tensors(base, adapter, format_, path):
    """The merged model written from tensors that were made whole, by the formula."""
    checkpoint, adapter = open_checkpoint(base), load_adapter(adapter)

    def merged(name):
        W, factors = checkpoint.tensor(name), adapter.trained(name)
        if not factors:
            return W
        A, B = factors
        return (W.float() + (B @ A) * adapter.scaling(name)).to(W.dtype)

    path.mkdir()
    staging = Staging(path)
    if format_ in ("same", checkpoint.format):
        checkpoint.write_copy(staging, merged, None, ignore_event)
    else:
        write = write_huggingface if format_ == "hf" else write_meta
        write(staging, checkpoint.config, merged, checkpoint.dtype, base, ignore_event)
    staging.finish_digests()
    return staging


def weight_files(path):
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth"))


@pytest.mark.parametrize("portion", [1 << 19, 70])
@pytest.mark.parametrize("format_", ["same", "hf", "meta"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_roads_give_the_same_bytes(bases, tmp_path, monkeypatch, layout, format_, portion):
    monkeypatch.setattr(checkpoint_module, "PORTION_WEIGHTS", portion)
    monkeypatch.setattr(merged_weights, "_FOLDED_WEIGHTS", portion)
    base, adapter = bases / layout, adapter_of(bases, layout)
    merge_lora(MergeOptions(base, adapter, tmp_path / "out", format_))
    judge = whole_tensors(base, adapter, format_, tmp_path / "judge")
    listed = json.loads((tmp_path / "out" / "llamatune.json").read_text())["files"]
    assert weight_files(tmp_path / "out")
    for ours, theirs in zip(weight_files(tmp_path / "out"), weight_files(tmp_path / "judge"), strict=True):
        digest = hashlib.sha256(ours.read_bytes()).hexdigest()
        assert ours.read_bytes() == theirs.read_bytes()
        assert listed[ours.name]["sha256"] == judge.digests[ours.name] == digest
        if ours.suffix == ".pth":
            with zipfile.ZipFile(ours) as archive:
                assert archive.testzip() is None
            assert torch.load(ours, weights_only=True)


@pytest.mark.parametrize("layout", ["shards", "meta in 2", "bin"])
def test_only_what_the_adapter_changes_is_read(bases, tmp_path, monkeypatch, layout):
    read, copied = [], []
    real_read, real_copy = Checkpoint._read, os.copy_file_range

    def recorded(self, part, mapped=False):
        read.append(part.begin)
        return real_read(self, part, mapped)

    def copying(source, target, count, begin, to):
        copied.append(count)
        return real_copy(source, target, count, begin, to)

    monkeypatch.setattr(Checkpoint, "_read", recorded)
    monkeypatch.setattr(os, "copy_file_range", copying)
    merge_lora(MergeOptions(bases / layout, bases / "adapter", tmp_path / "out"))
    checkpoint = open_checkpoint(bases / layout)
    changed = [name for name in checkpoint.shapes if name.split(".")[-2] in TARGETS]
    assert sorted(read) == sorted(part.begin for name in changed for part in checkpoint.parts[name])
    left = [part for name in checkpoint.shapes if name not in changed for part in checkpoint.parts[name]]
    assert sum(copied) == sum(part.end - part.begin for part in left)


@pytest.mark.parametrize("fault", [errno.EXDEV, errno.ENOSYS, 0, None])
def test_kernels_that_cannot_copy_change_nothing(bases, tmp_path, monkeypatch, fault):
    """Of None there is no such call; 0 stands for one that copies nothing and says so."""

    def refuse(*_):
        if fault:
            raise OSError(fault, os.strerror(fault))
        return 0

    for layout in ("shards", "meta in 2"):
        merge_lora(MergeOptions(bases / layout, bases / "adapter", tmp_path / f"{layout} by the kernel"))
        with monkeypatch.context() as patch:
            patch.delattr(os, "copy_file_range") if fault is None else patch.setattr(os, "copy_file_range", refuse)
            merge_lora(MergeOptions(bases / layout, bases / "adapter", tmp_path / layout))
        for one in weight_files(tmp_path / layout):
            assert one.read_bytes() == (tmp_path / f"{layout} by the kernel" / one.name).read_bytes()


def test_a_full_disk_while_copying_is_told_and_leaves_nothing(bases, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(EnvironmentFault, match=r"no space left for [\d,]+ bytes"):
        merge_lora(MergeOptions(bases / "shards", bases / "adapter", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_source_that_became_shorter_is_refused(tmp_path, monkeypatch, by_kernel):
    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "source").write_bytes(b"x" * 100)
    (tmp_path / "made").mkdir()
    with (
        pytest.raises(CheckpointError, match="became shorter"),
        writing_digested(Staging(tmp_path / "made"), "file", 200) as file,
    ):
        file.append(FileRange(tmp_path / "source", 50, 101))


def test_any_mixture_of_bytes_and_copies_is_digested(tmp_path, monkeypatch):
    from llamatune.formats import digested_file

    monkeypatch.setattr(digested_file, "_FOLLOWED_BYTES", 1000)
    monkeypatch.setattr(digested_file, "_COPIED_BYTES", 700)
    monkeypatch.setattr(digested_file, "_BLOCK_BYTES", 333)
    source = os.urandom(5000)
    (tmp_path / "source").write_bytes(source)
    staging, expected = Staging(tmp_path), bytearray()
    with writing_digested(staging, "file", 0) as file:
        for size in (0, 1, 999, 3000, 5, 4999):
            at = file.position
            for data in (b"----", FileRange(tmp_path / "source", 0, size), memoryview(source)[:size]):
                file.append(data)
            file.rewrite(at, b"head")
            expected += b"head" + 2 * source[:size]
            file.follow()
    staging.finish_digests()
    assert Path(tmp_path / "file").read_bytes() == expected
    assert staging.digests == {"file": hashlib.sha256(expected).hexdigest()}
