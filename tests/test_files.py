"""Durable writes and safe reads."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatune.durable_writing import refuse_occupied, write_atomic
from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError
from llamatune.formats.manifest import MANIFEST, build_directory, finished_product
from llamatune.formats.safetensors import TensorWriter, read_header
from llamatune.safe_reading import open_regular
from llamatune.strict_json import parse_json, read_json


def test_a_fifo_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError):
            open_regular(path)


def test_a_link_to_a_regular_file_is_legal(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "name").symlink_to("blob")
    with open_regular(tmp_path / "name") as file:
        assert file.read() == b"x"


def test_write_atomic_replaces_whole_files_with_the_umasks_mode(tmp_path: Path) -> None:
    target = tmp_path / "file"
    previous = os.umask(0o027)
    try:
        write_atomic(target, b"one")
        write_atomic(target, b"two")
    finally:
        os.umask(previous)
    assert target.read_bytes() == b"two"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")

    def fails(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFault, match="no space left"):
        write_atomic(target, fails)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_appears_whole_with_its_manifest_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), build_directory(target, "thing", {"a": 1}) as staging:
        (staging.path / "part").write_bytes(b"x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with build_directory(target, "thing", {"a": 1}) as staging:
        (staging.path / "part").write_bytes(b"x")
        staging.facts["count"] = 3
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["kind"] == "thing"
    assert manifest["facts"] == {"count": 3}
    assert manifest["files"]["part"]["bytes"] == 1
    found = finished_product(target, "thing", {"a": 1})
    assert found is not None
    assert (found.kind, found.facts, found.bytes) == ("thing", {"count": 3}, 1)
    assert finished_product(target, "thing", {"a": 2}) is None
    (target / "part").write_bytes(b"xy")
    assert finished_product(target, "thing", {"a": 1}) is None


def test_an_occupied_directory_is_kept_unless_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(EnvironmentFault, match="not empty"):
        refuse_occupied(target, overwrite=False)
    with pytest.raises(EnvironmentFault), build_directory(target, "thing", {}):
        pass
    assert (target / "mine").read_text() == "precious"
    with build_directory(target, "thing", {}, overwrite=True) as staging:
        (staging.path / "new").write_text("x")
    assert sorted(p.name for p in target.iterdir()) == sorted([MANIFEST, "new"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_fails_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where names cannot be swapped at all may the old product be away for a moment."""
    from llamatune import durable_writing

    target = tmp_path / "out"
    with build_directory(target, "thing", {}) as staging:
        (staging.path / "old").write_text("x")

    def replace() -> None:
        with build_directory(target, "thing", {}, overwrite=True) as staging:
            (staging.path / "new").write_text("x")

    def full(one: Path, other: Path) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable_writing, "_exchange", full)
    with pytest.raises(EnvironmentFault, match="no space left"):
        replace()
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "old"]
    monkeypatch.setattr(durable_writing, "_exchange", lambda one, other: False)
    replace()
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "new"]
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_dead_process_are_removed_and_foreign_files_kept(tmp_path: Path) -> None:
    dead = tmp_path / ".llamatune-tmp-999999999-out"
    dead.mkdir()
    (tmp_path / ".other").mkdir()
    with build_directory(tmp_path / "out", "thing", {}):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other", "out"]


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "1" * 6000, '"\\ud800"', "", "{", b"\xff", '{"a": Infinity}'],
)
def test_json_that_others_accept_and_we_do_not(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any ValueError is the contract
        parse_json(text)


def test_a_json_file_must_hold_an_object(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_json(tmp_path / "list.json")


def tensor_file(path: Path) -> Path:
    with path.open("wb") as file:
        writer = TensorWriter(file, [("a", "F32", (2, 3)), ("b", "U8", (5,))], {"format": "pt"})
        writer.write(bytes(24))
        writer.write(bytes(5))
        writer.finish()
    return path


def test_what_the_tensor_writer_writes_the_library_reads(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    loaded = safetensors_torch.load_file(tensor_file(tmp_path / "t.safetensors"))
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {"a": (2, 3), "b": (5,)}
    entries, metadata = read_header(tmp_path / "t.safetensors")
    assert entries["b"].end == (tmp_path / "t.safetensors").stat().st_size
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: raw[:20], lambda raw: b""]
)
def test_a_tensor_file_of_another_size_is_refused(tmp_path: Path, change: object) -> None:
    path = tensor_file(tmp_path / "t.safetensors")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError):
        read_header(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except LlamatuneError as fault:
        assert "\n" not in str(fault)
