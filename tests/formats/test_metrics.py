"""metrics.jsonl: every kind of line is read back as it was written, and broken lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamatune.errors import CheckpointError
from llamatune.events import Answer, EvalDone, Step, StepSkipped
from llamatune.formats.manifest import OtherVersion
from llamatune.formats.metrics import LayerGradNorms, MetricsLog, read_metrics


def make_step(number: int) -> Step:
    return Step(
        step=number, window=number, epoch=number / 8, loss=2.0, learning_rate=1e-3, grad_norm=20.0, loss_scale=1.0,
        target_tokens=100, tokens_per_second=1000.0, peak_memory_bytes=3 << 30, elapsed_s=0.5 * number,
    )  # fmt: skip


STEP = {"event": "step", **vars(make_step(1))}


def test_every_line_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    steps, norms = [make_step(1), make_step(2)], {"layers.0": 0.5, "lm_head": 2}
    evaluation = EvalDone(2, 2.5, 12.18, best=True, epoch=0.25, rows=3, target_tokens=40, seconds=0.1)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    answers = [Answer(step, 1, "a\n\u2028 prompt", 'an "answer"', None, 3, "length") for step in (0, 2)]
    for record in (answers[0], steps[0], LayerGradNorms(1, norms), StepSkipped(2, 32768.0), steps[1], evaluation):
        log.append(record)
    log.append(answers[1])
    size = log.sync()
    with log.path.open("a") as file:
        file.write('{"event": "of a later version", "step": "?"}\n')
    metrics = read_metrics(log.path)
    assert metrics.steps == steps
    assert metrics.evaluations == [EvalDone(2, 2.5)]
    assert metrics.skipped == [StepSkipped(2, 32768.0)]
    assert metrics.layer_grad_norms == {1: norms}
    assert metrics.answers == answers
    assert not metrics.torn
    log.cut(size)
    log.append(make_step(3))
    log.close()
    assert [step.step for step in read_metrics(log.path).steps] == [1, 2, 3]


def test_the_bytes_of_a_line(tmp_path: Path) -> None:
    """Scripts read these lines: the keys and their order stay."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(make_step(1))
    log.append(EvalDone(1, 2.0, 7.4, best=True, epoch=0.125, rows=3, target_tokens=40, seconds=0.1))
    log.append(StepSkipped(2, 32768.0))
    log.append(LayerGradNorms(1, {"layers.0": 0.5}))
    log.append(Answer(1, 2, "Why?", "Because.", "So.", 2, "eos"))
    log.close()
    assert log.path.read_text().splitlines() == [
        '{"event": "step", "step": 1, "window": 1, "epoch": 0.125, "loss": 2.0, "learning_rate": 0.001, '
        '"grad_norm": 20.0, "loss_scale": 1.0, "target_tokens": 100, "tokens_per_second": 1000.0, '
        '"peak_memory_bytes": 3221225472, "elapsed_s": 0.5}',
        '{"event": "eval", "step": 1, "loss": 2.0, "perplexity": 7.4, "best": true, "epoch": 0.125, "rows": 3, '
        '"target_tokens": 40, "seconds": 0.1}',
        '{"event": "skipped", "window": 2, "loss_scale": 32768.0}',
        '{"event": "layer_grad_norms", "step": 1, "norms": {"layers.0": 0.5}}',
        '{"event": "answer", "step": 1, "number": 2, "prompt": "Why?", "answer": "Because.", "reference": "So.", '
        '"tokens": 2, "finish_reason": "eos"}',
    ]


def test_a_log_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for version in (1, 2):
        path.write_text(json.dumps({"event": "schema", "version": version}) + "\n" + json.dumps(STEP) + "\n")
        if version == 1:
            assert len(read_metrics(path).steps) == 1
        else:
            with pytest.raises(OtherVersion, match="schema 2"):
                read_metrics(path)


ANSWER = {"event": "answer", "step": 0, "number": 1, "prompt": "", "answer": "", "reference": None, "tokens": 0,
          "finish_reason": "eos"}  # fmt: skip
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
    "an answer without a number": {**ANSWER, "number": 0},
    "an answer that is no text": {**ANSWER, "answer": 3},
    "an answer that nothing ended": {**ANSWER, "finish_reason": ""},
    "a line without end": "x" * (3 << 20),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_that_is_not_the_last_is_named(line: Any, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line) + "\n"
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + json.dumps({**STEP, "step": 9}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:[12]: was it edited"):
        read_metrics(path)
