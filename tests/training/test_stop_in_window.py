"""A stop inside a long accumulation window: finished if that is quick, else given up and done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import assert_same_outcome, make_spec, metrics

from llamatune.errors import Stopped
from llamatune.events import Event, RunStarted
from llamatune.training import stopping
from llamatune.training.train import train


class AskedAt:
    """Asks for a stop from its ``number``-th question on, counted from the beginning of training."""

    def __init__(self, number: int) -> None:
        self.left, self.begun = number, False

    def on_event(self, event: Event) -> None:
        self.begun |= isinstance(event, RunStarted)

    def should_stop(self) -> bool:
        self.left -= self.begun
        return self.left < 0


@pytest.mark.parametrize("patience", [0.0, 1e9], ids=["given up", "finished"])
@pytest.mark.parametrize("question", [1, 2, 4, 6, 9])
def test_a_run_stopped_inside_a_window_ends_in_the_same_bytes(
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: float,
    question: int,
) -> None:
    changes: dict[str, Any] = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 5}
    changes["training__tokens_per_pass"] = None
    whole = make_spec(tiny_base(), prepared(), tmp_path / "whole", **changes)
    train(whole)
    stopped = make_spec(tiny_base(), prepared(), tmp_path / "stopped", **changes)
    monkeypatch.setattr(stopping, "FINISHING_S", patience)
    asked = AskedAt(question)
    with pytest.raises(Stopped, match="run the same command again"):
        train(stopped, on_event=asked.on_event, should_stop=asked.should_stop)
    # Asked once between windows and once after each of the first four micro-batches.
    assert len(metrics(tmp_path / "stopped", "step")) == question // 5 + bool(patience)
    train(stopped)
    assert_same_outcome(tmp_path / "whole", tmp_path / "stopped")
