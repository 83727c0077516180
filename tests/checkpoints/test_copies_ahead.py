"""What a merge copies while torch is imported only saves time: the bytes are those of a merge that began without it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune import durable_writing
from llamatune.checkpoints import copies_ahead
from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.copies_ahead import copying_while_importing
from llamatune.checkpoints.merging import merge_lora
from llamatune.cli import main
from llamatune.command_options.conversion import ConvertOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError
from llamatune.formats.begun_files import copying_ahead
from llamatune.formats.digested_file import writing_digested
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import Staging

from .conftest import save_peft, save_tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases that are copied ahead, bases that are not, and an adapter of each."""
    root = tmp_path_factory.mktemp("bases")
    save_tiny(root / "shards", dtype=torch.bfloat16, shard="20KB")
    save_tiny(root / "one file", dtype=torch.bfloat16)
    save_tiny(root / "tied", dtype=torch.bfloat16, tied=True)
    weights = load_file(root / "one file" / "model.safetensors")
    for name in ("bin", "fp64"):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "one file" / "config.json").read_bytes())
    torch.save(weights, root / "bin" / "pytorch_model.bin")
    save_file({name: W.double() for name, W in weights.items()}, root / "fp64" / "model.safetensors", {"format": "pt"})
    for name in ("one file", "tied"):
        save_peft(root / f"adapter of {name}", root / name, ["q_proj", "down_proj"])
    return root


def options_of(bases, layout, output, **changes):
    adapter = bases / f"adapter of {'tied' if layout == 'tied' else 'one file'}"
    return MergeOptions(bases / layout, adapter, output, **changes)


@pytest.fixture
def cold(monkeypatch):
    """As if torch were not imported yet, and every model large enough."""
    monkeypatch.setattr(copies_ahead, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(copies_ahead, "_LEAST_BYTES", 0)


@pytest.fixture
def copiers(monkeypatch):
    """The names of the threads that copied, one for each call."""
    names, copy = [], os.copy_file_range

    def recorded(*call):
        names.append(threading.current_thread().name.partition("_")[0])
        return copy(*call)

    monkeypatch.setattr(os, "copy_file_range", recorded)
    return names


def files_in(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "llamatune.json"}


def wait_for(begun):
    wait([copying for file in begun.values() for copying in file._copying.values()])


@pytest.mark.parametrize("layout", ["shards", "one file", "tied", "bin"])
def test_a_merge_takes_over_what_was_copied_ahead(bases, tmp_path, cold, copiers, layout):
    options = options_of(bases, layout, tmp_path / "out")
    with copying_while_importing(options) as begun:
        assert begun
        wait_for(begun)
        assert list(tmp_path.iterdir()) == [], "a begun file has no name"
        merge_lora(options, begun=begun)
    assert set(copiers) == {"copying ahead"}
    merge_lora(options_of(bases, layout, tmp_path / "judge"))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "judge")


@pytest.mark.parametrize(
    ("layout", "changes"),
    [("fp64", {}), ("one file", {"format": "meta"}), ("one file", {"dtype": "float32"}), ("absent", {})],
)
def test_what_is_written_otherwise_is_not_copied_ahead(bases, tmp_path, cold, layout, changes):
    with copying_while_importing(options_of(bases, layout, tmp_path / "out", **changes)) as begun:
        assert not begun


@pytest.mark.parametrize("verb", ["merge-lora", "convert"])
def test_the_verbs_copy_while_they_import(bases, tmp_path, cold, copiers, verb):
    words = [verb, "--model", str(bases / "shards"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*words, *(["--adapter", str(bases / "adapter of one file")] if verb == "merge-lora" else [])])
    assert not ended.value.code
    assert "copying ahead" in copiers


@pytest.mark.parametrize("call", ["open", "link"])
def test_disks_without_unnamed_files_change_nothing(bases, tmp_path, cold, monkeypatch, call):
    real = getattr(os, call)

    def refused(path, *others, **named):
        if call == "link" or (others and others[0] & os.O_TMPFILE == os.O_TMPFILE):
            raise OSError("refused")
        return real(path, *others, **named)

    monkeypatch.setattr(os, call, refused)
    options = options_of(bases, "shards", tmp_path / "out")
    with copying_while_importing(options) as begun:
        assert bool(begun) == (call == "link")
        merge_lora(options, begun=begun)
    merge_lora(options_of(bases, "shards", tmp_path / "judge"))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "judge")


@pytest.mark.parametrize("layout", ["shards", "one file", "bin"])
@pytest.mark.parametrize("cut", [{}, {"shards": 3}, {"shard_bytes": 30_000}])
def test_a_conversion_takes_over_what_was_copied_ahead(bases, tmp_path, cold, copiers, layout, cut):
    options = ConvertOptions(model=bases / layout, output=tmp_path / "out", **cut)
    with copying_while_importing(options) as begun:
        assert begun
        wait_for(begun)
        convert(options, begun=begun)
    assert set(copiers) == {"copying ahead"}
    convert(ConvertOptions(model=bases / layout, output=tmp_path / "judge", **cut))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "judge")


@pytest.mark.parametrize("changes", [{"format": "meta"}, {"dtype": "float32"}])
def test_what_a_conversion_changes_is_not_copied_ahead(bases, tmp_path, cold, changes):
    with copying_while_importing(ConvertOptions(model=bases / "shards", output=tmp_path / "out", **changes)) as begun:
        assert not begun


def test_on_a_small_disk_nothing_is_taken_from_the_room_that_is_checked(bases, tmp_path, cold, monkeypatch):
    size = (bases / "one file" / "model.safetensors").stat().st_size
    free = (2 << 20) + size
    monkeypatch.setattr(durable_writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with copying_while_importing(options_of(bases, "one file", tmp_path / "out")) as begun:
        assert begun
    free = (1 << 20) + size
    with copying_while_importing(options_of(bases, "one file", tmp_path / "out")) as begun:
        assert not begun


def test_a_merge_that_is_refused_leaves_nothing(bases, tmp_path, cold):
    save_tiny(tmp_path / "other", hidden_size=64, intermediate_size=32)
    options = MergeOptions(tmp_path / "other", bases / "adapter of one file", tmp_path / "place" / "out")
    (tmp_path / "place").mkdir()
    with copying_while_importing(options) as begun, pytest.raises(CheckpointError):
        assert begun
        merge_lora(options, begun=begun)
    assert list((tmp_path / "place").iterdir()) == []


def test_what_lies_elsewhere_or_was_not_copied_is_copied_again(tmp_path, copiers):
    """A plan may be wrong: other places, other bytes, bytes that are not there, more than the file will hold."""
    source, short = os.urandom(3000), tmp_path / "short"
    (tmp_path / "source").write_bytes(source)
    short.write_bytes(source[:10])
    wrong = {
        0: FileRange(tmp_path / "source", 1000, 1100), 100: FileRange(tmp_path / "source", 0, 500),
        600: FileRange(short, 0, 20), 5000: FileRange(tmp_path / "source", 0, 3000),
    }  # fmt: skip
    staging = Staging(tmp_path / "made")
    staging.path.mkdir()
    with copying_ahead(tmp_path, {"file": wrong}) as begun:
        staging.begun = begun
        wait_for(begun)
        assert [begun["file"].holds(*place) for place in wrong.items()] == [True, True, False, True]
        with writing_digested(staging, "file", 700) as file:
            file.append(FileRange(tmp_path / "source", 0, 100))
            file.append(FileRange(tmp_path / "source", 0, 500))
            file.append(memoryview(source)[:99])
    assert (staging.path / "file").read_bytes() == source[:100] + source[:500] + source[:99]
    assert copiers.count("MainThread") == 1
