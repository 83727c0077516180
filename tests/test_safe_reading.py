"""Reads of regular files alone."""

import os
from pathlib import Path

import pytest

from llamatune.errors import CheckpointError
from llamatune.safe_reading import open_regular


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
