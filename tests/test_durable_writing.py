"""Durable writes of files and directories."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from llamatune import durable_writing
from llamatune.durable_writing import refuse_occupied, write_atomic
from llamatune.errors import EnvironmentFault, SpecError
from llamatune.formats.manifest import MANIFEST, build_directory
from llamatune.output_files import refuse_replacing, write_output


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


def test_what_cannot_be_looked_at_is_left_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean-up must not replace the error that ended the work: a file system may have gone away."""

    def stale(self: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_dir", stale)
    durable_writing.remove(tmp_path / "staging")


def test_an_output_that_would_replace_what_is_read_is_refused(tmp_path: Path) -> None:
    """The model itself, what holds it, the file that is read, and files elsewhere to which its directory links."""
    blobs, model = tmp_path / "blobs", tmp_path / "cache" / "model"
    blobs.mkdir()
    model.mkdir(parents=True)
    (blobs / "0").write_bytes(b"weights")
    (model / "model.safetensors").symlink_to("../../blobs/0")
    (model / "config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(model)
    for output in (model, model.parent, tmp_path, blobs, tmp_path / "alias", blobs / "0", blobs / ".." / "blobs"):
        with pytest.raises(SpecError, match="--output would replace"):
            refuse_replacing(output, [("--adapter", tmp_path.parent / "none"), ("--model", model)])
    for output in (model / "merged", tmp_path / "other", tmp_path / "blobs-2", blobs / "1"):
        refuse_replacing(output, [("--model", model)])


def test_what_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are no hard links, and for a directory."""
    target = tmp_path / "out"

    def meanwhile(file: BinaryIO) -> None:
        target.write_bytes(b"mine")

    def no_links(source: Path, path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for _ in range(2):
        with pytest.raises(EnvironmentFault, match=r"exists: .*out: choose another output, or pass --overwrite"):
            write_output(target, meanwhile, overwrite=False)
        assert target.read_bytes() == b"mine"
        target.unlink()
        write_output(target, b"made", overwrite=False)
        write_output(target, b"anew", overwrite=True)
        assert (target.read_bytes(), [path.name for path in tmp_path.iterdir()]) == (b"anew", ["out"])
        target.unlink()
        monkeypatch.setattr(os, "link", no_links)
    for name in ("mine", None):
        with contextlib.suppress(EnvironmentFault), build_directory(target, "thing", {}) as staging:
            (staging.path / "made").write_text("x")
            target.mkdir()
            if name:
                (target / name).write_text("precious")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert sorted(path.name for path in target.iterdir()) == (["mine"] if name else sorted(["made", MANIFEST]))
        shutil.rmtree(target)
    with pytest.raises(EnvironmentFault, match="exists and is not a directory"), build_directory(target, "thing", {}):
        target.write_text("mine")
    assert target.read_text() == "mine"


def test_a_leftover_of_a_killed_write_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".llamatune-tmp-999999999-out").write_text("half")
    write_output(tmp_path / "out", b"made", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
