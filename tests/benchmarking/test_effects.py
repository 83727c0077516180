"""What a technique did, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llamatune.benchmarking.effects import effects
from llamatune.benchmarking.results import CATEGORIES
from llamatune.spec_grid import parse_axis

LORA, PRECISION = parse_axis("lora=off,on"), parse_axis("training.precision=fp32,bf16")


def cell(lora: str, precision: str, step_s: float, held_out: tuple[float, ...] = (), **mib: int) -> dict[str, Any]:
    categories = {name: mib.get(name, 0) << 20 for name in CATEGORIES}
    return {
        "values": {"lora": lora, "training.precision": precision},
        "status": "measured",
        "allocated_bytes": sum(categories.values()),
        "categories": categories,
        "step_s": step_s,
        "tokens_per_second": 1000 / step_s,
        "held_out_losses": list(held_out),
    }


# Peaks in MiB: 1000, 900, 400, 500.
CELLS = [
    cell("off", "fp32", 1.0, (2.0, 2.2), parameters=200, gradients=200, optimizer=400, activations=200),
    cell("off", "bf16", 0.5, (2.1, 2.3), parameters=200, gradients=200, optimizer=400, activations=60, casts=40),
    cell("on", "fp32", 0.8, (3.0, 3.1), parameters=210, gradients=10, optimizer=20, activations=150, temporary=10),
    cell("on", "bf16", 0.6, (3.0, 3.2), parameters=210, gradients=10, optimizer=20, activations=80, casts=180),
]


def test_changes_are_those_of_the_pairs_that_differ_in_one_technique() -> None:
    lora, precision = effects([LORA, PRECISION], CELLS)
    assert (lora.key, lora.off, lora.on, len(lora.pairs)) == ("lora", "off", "on", 2)
    peak = lora.changes["peak memory"]
    assert (peak.median, peak.lowest, peak.highest) == pytest.approx(((-60 - 400 / 9) / 2, -60, -400 / 9))
    assert (lora.changes["optimizer"].lowest, lora.changes["optimizer"].highest) == pytest.approx((-380 / 9, -38))
    for effect in (lora, precision):
        for pair in effect.pairs:
            assert sum(pair.changes[name] for name in CATEGORIES) == pytest.approx(pair.changes["peak memory"])
    assert precision.changes["time for equal work"].lowest == pytest.approx(-50)
    assert precision.changes["tokens/s"].highest == pytest.approx(100)
    assert precision.changes["held-out loss"].median == pytest.approx((0.1 + 0.05) / 2)
    assert lora.changes["held-out loss"].highest == pytest.approx(0.95)
    # The changes of the two seeds: 0.1 and 0.1 without LoRA, 0.0 and 0.1 with it.
    assert precision.seed_spread == pytest.approx(0.1 * 0.5**0.5 / 2)


def test_a_change_of_sign_is_flagged_and_told_by_its_cause() -> None:
    lora, precision = effects([LORA, PRECISION], CELLS)
    assert not lora.changes["peak memory"].changes_sign
    assert precision.changes["peak memory"].changes_sign
    assert not precision.changes["tokens/s"].changes_sign
    first, second = precision.sentences
    assert first == (
        "peak memory changes its sign: it rose with lora=on (median +25.0 %: casts +45.0, activations -17.5, "
        "temporary -2.5) and fell with lora=off (median -10.0 %: activations -14.0, casts +4.0)"
    )
    assert "add up to 45.0 % of the peak (lora=on), while activations change by -17.5" in second
    assert lora.sentences == (
        "tokens/s changes its sign: it rose with precision=fp32 (median +25.0 %) and fell with precision=bf16 "
        "(median -16.7 %)",
    )


def test_what_is_closer_to_nothing_than_the_noise_has_no_sign() -> None:
    cells = [
        cell("off", "fp32", 1.000, parameters=1000),
        cell("off", "bf16", 1.015, parameters=1004),
        cell("on", "fp32", 1.000, parameters=1000),
        cell("on", "bf16", 0.985, parameters=996),
    ]
    _, precision = effects([LORA, PRECISION], cells)
    assert not any(change.changes_sign for change in precision.changes.values())
    assert precision.sentences == ()


def test_a_sign_that_no_other_technique_decides_is_told_by_counts() -> None:
    third = parse_axis("training.fused=false,true")
    chosen = {("off", "false"): 1100, ("off", "true"): 900, ("on", "false"): 900, ("on", "true"): 1100}
    cells = []
    for (lora, fused), peak in chosen.items():
        for precision, size in (("fp32", 1000), ("bf16", peak)):
            found = cell(lora, precision, 1.0, parameters=size)
            found["values"] = {**found["values"], "training.fused": fused}
            cells.append(found)
    effect = effects([LORA, PRECISION, third], cells)[1]
    assert "rose with lora=off, fused=false or lora=on, fused=true" in effect.sentences[0]


def test_cells_that_were_not_measured_make_no_pair() -> None:
    cells = [*CELLS[:3], {"values": CELLS[3]["values"], "status": "oom", "reason": "out of memory"}]
    lora, precision = effects([LORA, PRECISION], cells)
    assert len(lora.pairs) == len(precision.pairs) == 1
    assert lora.pairs[0].others == {"training.precision": "fp32"}
    assert effects([LORA, PRECISION], cells[:1]) == []


def test_a_cell_without_held_out_rows_has_no_impact_on_accuracy() -> None:
    cells = [{**CELLS[0], "held_out_losses": []}, *CELLS[1:]]
    lora, precision = effects([LORA, PRECISION], cells)
    assert "held-out loss" not in lora.pairs[0].changes
    assert precision.changes["held-out loss"].median == pytest.approx(0.05)
