"""The end against the start, and likely causes, on curves with known answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_material import falling, make_steps, noisy, write_run

from llamatune.events import EvalDone
from llamatune.reporting.diagnosis import Diagnosis, diagnose, diagnose_run
from llamatune.reporting.divergence import judge_course
from llamatune.reporting.report_text import findings
from llamatune.reporting.run_reader import read_run

HOT = [4.83, *[5 + 0.55 * n for n in range(6)], *[4.95 + 2.8 * 0.9**n for n in range(62)]]
"""The course of a rate that is too high: 4.83, a peak of 7.75, 4.95 at the end."""


def _verdict(losses: list[float], evaluations: list[EvalDone], at_start: float | None) -> str | None:
    found = judge_course(make_steps(losses), evaluations, None if at_start is None else EvalDone(0, at_start))
    return None if found is None else found.verdict


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_ends_above_its_start_diverged(validated: bool, seed: int) -> None:
    evaluations = [EvalDone(69, 4.97)] if validated else []
    assert _verdict(noisy(HOT, 0.01, seed), evaluations, 4.24 if validated else None) == "diverged"


@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.2])
def test_a_run_that_learns_is_told_so(deviation: float) -> None:
    for seed in range(20):
        losses = noisy(falling(100), deviation, seed)
        assert _verdict(losses, [], None) == "learned"
        assert _verdict(losses, [EvalDone(100, 1.1)], 3.0) == "learned"


def test_over_fitting_is_no_divergence() -> None:
    found = judge_course(make_steps(falling(100, 0.2)), [EvalDone(100, 0.9)], EvalDone(0, 0.6))
    assert found is not None
    assert found.verdict != "diverged"


@pytest.mark.parametrize("deviation", [0.05, 0.3])
def test_a_level_run_is_not_clearly_better(deviation: float) -> None:
    verdicts = [_verdict(noisy([2.0] * 80, deviation, seed), [], None) for seed in range(40)]
    assert verdicts.count("unchanged") >= 37


def test_a_run_that_came_back_from_far_above_is_told() -> None:
    assert _verdict([*HOT[:10], *falling(60, 2.0)], [EvalDone(70, 2.0)], 4.3) == "recovered"


def test_too_little_is_not_judged() -> None:
    assert _verdict([3.0] * 9, [], None) is None
    assert _verdict([], [EvalDone(1, 1.0)], 2.0) is None
    assert _verdict([3.0, 2.5], [EvalDone(2, 2.4)], 3.0) == "learned"


def _diagnosed(path: Path) -> Diagnosis:
    return diagnose_run(read_run(path, "run"))


def test_divergence_without_overflow_is_the_rates_and_the_evidence_is_the_logs(tmp_path: Path) -> None:
    found = _diagnosed(write_run(tmp_path / "run", HOT))
    assert found.cause is not None
    assert found.cause.kind == "learning rate"
    text = findings(found)[0]
    assert text.startswith("Diverged: ")
    assert "4.83" in text
    assert "100% of the updates were clipped to 1" in text


def test_a_loss_that_multiplied_is_told_in_times() -> None:
    text = findings(diagnose(make_steps([0.01, *[3.0] * 30]), []))[0]
    assert text.startswith("Diverged: 3.0000 at the end, 300 times the first update's loss (0.0100)")


def test_divergence_with_many_skipped_windows_is_overflow(tmp_path: Path) -> None:
    skipped = {n: [{"event": "skipped", "window": n, "loss_scale": 2.0 ** (3 - n)}] for n in range(2, 9)}
    found = _diagnosed(write_run(tmp_path / "run", HOT, extra=skipped, training__precision="fp16"))
    assert found.cause is not None
    assert (found.cause.kind, "7 of 76 windows" in found.cause.evidence[0]) == ("overflow", True)


def test_a_spike_of_one_window_is_its_rows_and_one_that_stays_is_the_rates(tmp_path: Path) -> None:
    losses = noisy(falling(200), 0.05)
    losses[120] *= 6
    (short,) = _diagnosed(write_run(tmp_path / "short", losses)).spikes
    assert short.cause is not None
    assert (short.cause.kind, short.cause.evidence) == ("rows", ["it was over after 1 update"])
    stays = noisy([*falling(200), *[8.0] * 30], 0.05)
    (long,) = _diagnosed(write_run(tmp_path / "long", stays)).spikes
    assert long.cause is not None
    assert (long.cause.kind, long.cause.evidence[0]) == ("learning rate", "it did not end")
    skipped = {119: [{"event": "skipped", "window": 119, "loss_scale": 0.5}]}
    (near,) = _diagnosed(write_run(tmp_path / "near", losses, extra=skipped)).spikes
    assert near.cause is not None
    assert near.cause.kind == "overflow"
