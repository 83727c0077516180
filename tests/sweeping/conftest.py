"""Specs of sweeps, which are trained in the process of the test unless it says otherwise, and have no page drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import spec_values

from llamatune.sweeping import groups
from llamatune.sweeping import run_sweep as sweep_module


@pytest.fixture(scope="module")
def base_spec(
    tmp_path_factory: pytest.TempPathFactory, small_base: Path, prepared: Callable[..., Path]
) -> Callable[..., Path]:
    """A spec file with some changes: micro-batches of 3, windows of 6 of the 19 rows, validation and odd saves."""

    def write(**changes: Any) -> Path:
        tmp_path = tmp_path_factory.mktemp("spec")
        settings = {
            "training__save_every_steps": 3, "evaluation__every_steps": 2,
            "training__tokens_per_pass": None, **changes,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        values = spec_values(small_base, prepared(validation_fraction=0.2), tmp_path / "unused", **settings)
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture(scope="module")
def grid_spec(base_spec: Callable[..., Path]) -> Path:
    """The spec of the sweeps that are interrupted."""
    return base_spec(training__save_every_steps=2, training__max_steps=4)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes longer than all the rest; one test has it drawn."""
    if "page" not in request.node.name:
        monkeypatch.setattr(sweep_module, "write_page", lambda *_: False)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cores there are."""
    monkeypatch.setattr(groups, "usable_cores", list)
