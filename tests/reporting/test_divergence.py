"""The end against the start, and likely causes, on curves with known answers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from report_material import falling, make_steps, noisy, write_run

from llamatune.events import EvalDone, Step
from llamatune.reporting.diagnosis import Diagnosis, diagnose, diagnose_run
from llamatune.reporting.divergence import _levels, judge_course
from llamatune.reporting.norm_jumps import judge_norms
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


@pytest.mark.parametrize(("count", "width"), [(1, 3), (2, 3), (7, 3), (50, 5), (50, 50), (61, 6)])
def test_levels_are_medians_of_neighbours_also_where_losses_are_equal(count: int, width: int) -> None:
    chance = random.Random(count)
    steps = make_steps([round(chance.random(), 1) for _ in range(count)])
    losses = [step.loss for step in steps]
    expected = [median(losses[place : place + width]) for place in range(max(1, count - width + 1))]
    assert _levels(steps, width)[0] == expected


def test_too_little_is_not_judged() -> None:
    assert _verdict([3.0] * 9, [], None) is None
    assert _verdict([], [EvalDone(1, 1.0)], 2.0) is None
    assert _verdict([3.0, 2.5], [EvalDone(2, 2.4)], 3.0) == "learned"


def _turned(count: int, last: float) -> list[float]:
    """Falls from 6 to 2 in the first half, then rises to ``last``."""
    half = count // 2
    return [2 + 4 * math.exp(-8 * at / half) for at in range(half)] + [
        2 + (last - 2) * at / (count - half) for at in range(count - half)
    ]


@pytest.mark.parametrize(("count", "deviation", "last"), [(40, 0.05, 3.5), (200, 0.1, 4.0), (1000, 0.3, 4.0)])
def test_a_training_loss_that_ends_well_above_its_lowest_became_unstable(
    count: int, deviation: float, last: float
) -> None:
    for seed in range(20):
        losses = noisy(_turned(count, last), deviation, seed)
        assert _verdict(losses, [], None) == "unstable"
        assert _verdict(losses, [EvalDone(count, 3.0)], 6.0) == "unstable"


@pytest.mark.parametrize("count", [12, 40, 200, 1000])
@pytest.mark.parametrize("deviation", [0.02, 0.2, 0.5])
def test_a_level_end_is_not_called_unstable(count: int, deviation: float) -> None:
    """Of 100 runs of two kinds: those that fall throughout, and those that are soon level. With little noise also of
    those that rise by a tenth, which is below what counts.
    """
    shapes = [falling(count), [1 + 9 * math.exp(-place / 3) for place in range(count)]]
    shapes += [_turned(count, 2.2)] if deviation < 0.1 else []
    alarms = sum(
        _verdict(noisy(shape, deviation, seed), [], None) == "unstable" for shape in shapes for seed in range(50)
    )
    assert alarms <= (0 if deviation < 0.1 else 1)


def test_a_run_that_knows_its_rows_may_double_a_loss_that_is_next_to_nothing() -> None:
    assert _verdict([8 * 0.7**at for at in range(30)] + [0.01] * 30 + [0.03] * 30, [], None) == "learned"


def test_instability_is_no_over_fitting_and_is_told_with_rate_norms_and_clipping(tmp_path: Path) -> None:
    evaluations = [EvalDone(50, 2.1), EvalDone(100, 1.9), EvalDone(150, 2.9), EvalDone(200, 4.5)]
    run = write_run(tmp_path / "run", noisy(_turned(200, 4.0), 0.02), evaluations, training__warmup_steps=3)
    found = _diagnosed(run)
    assert found.course is not None
    assert found.course.rose_step is not None
    assert found.course.lowest_loss == pytest.approx(2.0, rel=0.05)
    assert found.course.trained_loss == pytest.approx(3.8, rel=0.05)
    assert 110 < found.course.rose_step < 150
    text = findings(found)[0]
    assert text.startswith(f"Became unstable: the training loss ended at {found.course.trained_loss:.4f}, ")
    assert f"from step {found.course.rose_step}, at a rate of " in text
    assert "about the lowest loss and 39." in text or "about the lowest loss and 40." in text
    assert "100% of the updates were clipped to 1" in text
    assert "order" not in text
    assert found.validation is not None
    assert found.validation.verdict == "rising"
    assert not findings(found)[2].startswith("Over-fitting")
    in_order = _diagnosed(write_run(tmp_path / "in order", noisy(_turned(200, 4.0), 0.02), data__shuffle=False))
    assert "the rows came in the file's order" in findings(in_order)[0]


def _with_norms(losses: list[float], norms: list[float]) -> list[Step]:
    return [replace(step, grad_norm=norm) for step, norm in zip(make_steps(losses), norms, strict=True)]


@pytest.mark.parametrize("count", [16, 32, 200])
def test_norms_that_jump_by_orders_of_magnitude_are_told_and_ordinary_ones_are_not(count: int) -> None:
    curve, found = falling(count, 3.0), {0.3: 0, 0.6: 0, 2.0: 0}
    for deviation in found:
        for seed in range(50):
            norms = noisy([5.0] * count, deviation, seed + 100)
            found[deviation] += judge_norms(_with_norms(noisy(curve, 0.2, seed), norms)) is not None
    assert found[0.3] == 0
    assert found[0.6] <= (4 if count < 32 else 1)
    assert found[2.0] >= 48


def test_norms_that_vary_as_the_losses_do_are_ordinary() -> None:
    """Tiny batches, of which some have a loss near zero."""
    for seed in range(30):
        losses = noisy([0.1] * 100, 1.5, seed)
        assert judge_norms(_with_norms(losses, [10 * loss for loss in losses])) is None
    assert judge_norms(_with_norms([1.0] * 11, [1.0, 1e4] * 5 + [1.0])) is None


def test_jumping_norms_name_the_rate_of_a_run_that_learned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", noisy(falling(40), 0.1), training__max_grad_norm=None)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [{**json.loads(line), "grad_norm": 0.05 if number % 2 else 50.0} for number, line in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    text = findings(_diagnosed(run))[0]
    assert text.startswith("Learned: ")
    assert "Training was not stable: the gradient's norm changed by a factor of about " in text
    assert "between 0.05 and 50. Likely cause: the learning rate is too high" in text
    assert "the highest rate was 0.000976; the gradient is not clipped" in text


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
