"""Sweeps of a test: their options, and what their runs must come out as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from run_tools import assert_same_outcome, metrics

from llamatune.command_options.sweep import SweepOptions
from llamatune.sweeping.members import plan_members
from llamatune.training.train import train

GRID = ("lora.r=2,4", "training.learning_rate=0.01,0.03")
"""Four runs."""


def options(spec: Path, output: Path, *grid: str, **more: Any) -> SweepOptions:
    return SweepOptions(spec_path=spec, grid=grid, output=output, **more)


def assert_equal_to_solo_runs(output: Path, spec: Path, *grid: str) -> None:
    """Every run of a sweep against ``train`` of its spec alone, which is trained once a spec file."""
    _, members = plan_members(options(spec, spec.with_name("solo"), *grid))
    for member in members:
        assert member.spec is not None
        train(member.spec)
        # a card tells its output directory
        assert_same_outcome(output / "runs" / member.name, member.path, cards=False)
        found, expected = (metrics(path) for path in (output / "runs" / member.name, member.path))
        assert [line["event"] for line in found] == [line["event"] for line in expected]
