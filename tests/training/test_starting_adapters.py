"""``lora.init_from``: an adapter that states the same updates in other words is a start; any other is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import make_spec

from llamatune.checkpoints.adapter import Adapter
from llamatune.errors import CheckpointError
from llamatune.events import ignore_event
from llamatune.training.inputs import open_inputs

Start = Callable[..., Adapter | None]


@pytest.fixture
def start(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> Start:
    """The starting adapter of a run whose lora section is ``lora``, from what PEFT makes of the other options."""

    def open_start(lora: dict[str, Any], targets: Any = ("q_proj", "v_proj"), **adapter: Any) -> Adapter | None:
        path = peft_adapter(tiny_base(), targets if isinstance(targets, str) else list(targets), r=4, **adapter)
        spec = make_spec(tiny_base(), prepared(), tmp_path / "run", lora={"r": 4, **lora, "init_from": str(path)})
        return open_inputs(spec, False, ignore_event).starting_adapter

    return open_start


SAME = [
    ({"alpha": 12}, {"alpha": 6, "use_rslora": True}),
    ({"alpha": 6, "use_rslora": True}, {"alpha": 12}),
    ({"alpha": 8, "target_modules": "all-linear"}, {"alpha": 8, "targets": "all-linear"}),
    ({"alpha": 8}, {"alpha": 8, "targets": r".*\.(q|v)_proj"}),
    ({"alpha": 8, "alphas": {"v_proj": 3}}, {"alpha": 8, "alpha_pattern": {r".*v_proj": 3}}),
    ({"alpha": 8}, {"alpha": 3, "alpha_pattern": {"q_proj": 8, "v_proj": 8}}),
]


@pytest.mark.parametrize(("lora", "adapter"), SAME)
def test_the_same_updates_are_a_start(start: Start, lora: dict[str, Any], adapter: dict[str, Any]) -> None:
    assert start(lora, **adapter) is not None


OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"alpha": 6}, {"alpha": 6, "use_rslora": True}),
    ({"alpha": 8}, {"alpha": 8, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    ({"alpha": 8}, {"alpha": 8, "layers_to_transform": [0, 1]}),
]


@pytest.mark.parametrize(("lora", "adapter"), OTHERS)
def test_other_updates_are_refused(start: Start, lora: dict[str, Any], adapter: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="give the lora section the same"):
        start(lora, **adapter)


def test_the_remedy_is_accepted(start: Start) -> None:
    adapter = {"alpha": 6, "use_rslora": True}
    with pytest.raises(CheckpointError) as caught:
        start({"alpha": 6}, **adapter)
    stated = re.search(r"r (\d+) with alpha ([\d.]+) here", str(caught.value))
    assert stated is not None
    assert start({"r": int(stated[1]), "alpha": float(stated[2])}, **adapter) is not None


def test_what_is_not_trained_further_is_refused(start: Start) -> None:
    with pytest.raises(CheckpointError, match=r"also changes lm_head.weight of the base.*merge it into the base"):
        start({"alpha": 8}, alpha=8, modules_to_save=["lm_head"])
