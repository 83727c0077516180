"""Logs of runs in every state, and logs that no run wrote."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from report_material import falling, make_steps, write_run

from llamatune.errors import CheckpointError, SpecError
from llamatune.reporting.run_reader import Evaluation, name_runs, read_metrics, read_run

STEP = {"event": "step", **vars(make_steps([2.0])[0])}


def test_every_line_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    evaluations = [Evaluation(4, 2.5), Evaluation(8, 2.25)]
    norms = {"event": "layer_grad_norms", "step": 3, "norms": {"layers.0": 0.5, "lm_head": 2}}
    skipped = {"event": "skipped", "window": 6, "loss_scale": 32768.0}
    other = {"event": "of a later version", "step": "?"}
    run = write_run(tmp_path / "run", falling(8), evaluations, {3: [norms, other], 5: [skipped]})
    metrics = read_metrics(run / "metrics.jsonl")
    assert metrics.steps == make_steps(falling(8))
    assert metrics.evaluations == evaluations
    assert [vars(line) for line in metrics.skipped] == [{"window": 6, "loss_scale": 32768.0}]
    assert metrics.layer_grad_norms == {3: {"layers.0": 0.5, "lm_head": 2}}
    assert not metrics.torn


@pytest.mark.parametrize(
    "tail", ['{"event": "st', "x", '{"event": "step"}', '{"a": 1}\n\x00\x00\x00', "[1]\n", "\xff\n"]
)
def test_a_torn_last_line_is_left_out(tail: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", falling(5), tail=tail), "run")
    assert len(run.metrics.steps) == 5
    assert run.metrics.torn
    assert "the last line of metrics.jsonl is not whole and was left out" in run.notices


BROKEN: dict[str, Any] = {
    "text": "loss went down\n",
    "a list": "[1, 2]\n",
    "no number": {**STEP, "loss": "2.0"},
    "true": {**STEP, "loss": True},
    "nothing": {**STEP, "loss": None},
    "not finite": json.dumps(STEP).replace("2.0", "1e999", 1) + "\n",
    "beyond any figure": {**STEP, "grad_norm": 1e200},
    "a step in parts": {**STEP, "step": 1.5},
    "digits without end": json.dumps(STEP).replace("2.0", "9" * 5000, 1) + "\n",
    "a huge step": {**STEP, "step": 1 << 60},
    "no target tokens": {**STEP, "target_tokens": 0},
    "the same step twice": json.dumps(STEP) + "\n" + json.dumps(STEP) + "\n",
    "an evaluation of no step": {"event": "eval", "step": 3, "loss": 1.0},
    "norms that are none": {"event": "layer_grad_norms", "step": 1, "norms": [1]},
    "no norms": {"event": "layer_grad_norms", "step": 1, "norms": {}},
    "norms of text": {"event": "layer_grad_norms", "step": 1, "norms": {"a": "b"}},
    "a line without end": "x" * (3 << 20),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_that_is_not_the_last_is_named(line: Any, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line) + "\n"
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + json.dumps({**STEP, "step": 9}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:[12]: was it edited"):
        read_metrics(path)


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
        ({"host": socket.gethostname(), "pid": os.getpid()}, None, "running"),
        ({"host": socket.gethostname(), "pid": 1 << 30}, None, "unfinished"),
        ({"host": "another machine", "pid": 1 << 30}, None, "running"),
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
