"""Reads of regular files alone."""

import os
from pathlib import Path

import pytest

from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.formats.metrics import MetricsLog
from llamatune.safe_reading import open_own, open_regular
from llamatune.training.run_lock import LOCK, run_lock


def test_a_fifo_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError):
            open_regular(path)


def test_what_is_appended_to_or_locked_is_a_regular_file_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path / "device"):
        with pytest.raises(EnvironmentFault, match="not a regular file"):
            open_own(path, os.O_RDWR)
        with pytest.raises(EnvironmentFault, match="not a regular file"):
            MetricsLog(path)
    for path in (tmp_path, tmp_path / "loop"):
        with pytest.raises(EnvironmentFault, match="cannot write"):
            MetricsLog(path)
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(EnvironmentFault, match="not a regular file"), run_lock(tmp_path):
        pass


def test_a_link_to_a_regular_file_is_legal(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "name").symlink_to("blob")
    with open_regular(tmp_path / "name") as file:
        assert file.read() == b"x"
