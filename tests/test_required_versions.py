"""Packages that are too old are refused by name; the floors are those that installers are told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from llamatune.errors import EnvironmentFault
from llamatune.required_versions import OLDEST, require_version


@pytest.mark.parametrize("found", ["2.9.1", "2.9.1+cu128", "1.13", "2.9rc1", "2"])
def test_an_older_torch_is_refused(found: str) -> None:
    with pytest.raises(EnvironmentFault, match=r"is too old: 2\.10 or later is needed: pip install 'torch>=2\.10'"):
        require_version("torch", found)


@pytest.mark.parametrize("found", ["2.10", "2.10.0", "2.13.0+cpu", "2.11rc1", "2.12.0a0+git1234", "3.0"])
def test_this_and_newer_ones_are_fine(found: str) -> None:
    require_version("torch", found)


def test_the_floors_are_those_of_the_package() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    wanted = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {f"{name}>={oldest}" for name, oldest in OLDEST.items()} <= set(wanted)
