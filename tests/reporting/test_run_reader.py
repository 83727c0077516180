"""Run directories read back in every state."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from report_material import falling, write_run

from llamatune.errors import CheckpointError, SpecError
from llamatune.reporting.run_reader import name_runs, read_run


@pytest.mark.parametrize(
    "tail", ['{"event": "st', "x", '{"event": "step"}', '{"event": "later"}\n\x00\x00\x00', "[1]\n", "\xff\n"]
)
def test_a_torn_last_line_is_left_out(tail: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", falling(5), tail=tail), "run")
    assert len(run.metrics.steps) == 5
    assert run.metrics.torn
    assert "the last line of metrics.jsonl is not whole and was left out" in run.notices


@pytest.mark.parametrize("content", [{}, {"spec.yaml": "model: {path: x}"}, {"metrics.jsonl": ""}])
def test_what_is_no_run_directory_is_said_to_be_none(content: dict[str, str], tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_run(tmp_path, "run")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_run(tmp_path / "absent", "run")


def test_a_spec_that_cannot_be_read_is_a_fault_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(3))
    (run / "spec.yaml").write_text("model: {path: x, colour: red}\n")
    with pytest.raises(CheckpointError, match=r"unknown key"):
        read_run(run, "run")


@pytest.mark.parametrize(
    ("note", "summary", "status"),
    [
        ({"host": socket.gethostname(), "started": "now", "pid": os.getpid()}, None, "running"),
        ({"host": socket.gethostname(), "started": "now", "pid": 1 << 30}, None, "unfinished"),
        ({"host": "another machine", "started": "now", "pid": 1 << 30}, None, "running"),
        ("", None, "unfinished"),
        ('{"host": ', None, "unfinished"),
        (None, None, "unfinished"),
        ("", {"steps": 3}, "finished"),
        ("", {"steps": 3, "stopped_early": True}, "stopped early"),
    ],
)
def test_the_status_follows_from_summary_and_lock(note: Any, summary: Any, status: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(3), summary=summary)
    if note is not None:
        (run / ".llamatune.lock").write_text(note if isinstance(note, str) else json.dumps(note))
    assert read_run(run, "run").status == status


def test_runs_are_named_by_directory_or_by_path_where_that_is_not_enough(tmp_path: Path) -> None:
    one, two, three = (tmp_path / part for part in ("a/run", "b/run", "b/other"))
    assert name_runs([one, two, three]) == [str(one), str(two), "other"]
    with pytest.raises(SpecError, match="given twice"):
        name_runs([one, three, tmp_path / "b" / ".." / "a" / "run"])
