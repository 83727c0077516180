"""Layer-wise gradient norms and profiler traces: right, each step once, and without a trace in the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import StopAfter, adapter_tensors, make_spec, metrics
from safetensors.torch import load_file

from llamatune.errors import Stopped
from llamatune.spec import RunSpec
from llamatune.training.train import train


@pytest.fixture
def spec_with(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., RunSpec]:
    return lambda name="run", **changes: make_spec(tiny_base(), prepared(), tmp_path / name, **changes)


ALONE: dict[str, Any] = {"training__tokens_per_pass": None}
"""Each micro-batch is a pass."""


def test_layer_norms_are_what_an_sgd_step_moved_each_layer_by(
    tiny_base: Callable[..., Path], spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    rate = 1.0
    train(
        spec_with(
            lora=None, training__max_steps=1, training__optimizer="sgd", training__learning_rate=rate,
            training__max_grad_norm=None, training__log_layer_grad_norms=True,
        )
    )  # fmt: skip
    before = load_file(tiny_base() / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    squares: dict[str, float] = {}
    for name in before:
        parts = name.split(".")
        layer = "layers." + parts[2] if "layers" in parts else parts[-2]
        moved = float(((after[name].double() - before[name].double()) / rate).square().sum())
        squares[layer] = squares.get(layer, 0.0) + moved
    (line,) = metrics(tmp_path / "run", "layer_grad_norms")
    assert line["step"] == 1
    assert line["norms"].keys() == {"embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head"}
    assert line["norms"] == pytest.approx({layer: math.sqrt(total) for layer, total in squares.items()}, rel=1e-4)


def test_layer_norms_make_up_the_norm_before_clipping_and_change_nothing(
    spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    clipped = {"training__max_grad_norm": 0.01, "training__max_steps": 3}
    train(spec_with("plain", **clipped))
    train(spec_with("watched", **clipped, training__log_layer_grad_norms=True))
    lines = metrics(tmp_path / "watched", "layer_grad_norms")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line, step in zip(lines, metrics(tmp_path / "watched", "step"), strict=True):
        assert line["norms"].keys() == {"layers.0", "layers.1", "layers.2"}
        assert math.hypot(*line["norms"].values()) == pytest.approx(step["grad_norm"], rel=1e-5)
    plain, watched = (adapter_tensors(tmp_path / name / "adapter") for name in ("plain", "watched"))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not metrics(tmp_path / "plain", "layer_grad_norms")


def test_stopped_and_killed_runs_record_each_steps_layer_norms_once(
    spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    watched = {"training__max_steps": 6, "training__log_layer_grad_norms": True}
    train(spec_with("whole", **watched))
    for count in (1, 2, 99):
        stop = StopAfter(count)
        try:
            train(spec_with("parts", **watched), on_event=stop.on_event, should_stop=stop.should_stop)
        except Stopped:
            with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:  # as a killed process leaves it
                log.write('{"event": "layer_grad_norms", "step": 99, "norms": {}}\n{"event": "layer_gr')
    assert metrics(tmp_path / "parts", "layer_grad_norms") == metrics(tmp_path / "whole", "layer_grad_norms")


def test_each_start_leaves_a_trace_of_its_first_windows(spec_with: Callable[..., RunSpec], tmp_path: Path) -> None:
    spec, stop = spec_with(training__max_steps=4, training__profile_steps=2, **ALONE), StopAfter(1)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec)
    traces = {path.name: json.loads(path.read_text()) for path in (tmp_path / "run").glob("trace-*.json")}
    assert sorted(traces) == ["trace-from-step-000001.json", "trace-from-step-000002.json"]
    forward_passes = {
        name: sum(event.get("name") == "aten::embedding" for event in trace["traceEvents"])
        for name, trace in traces.items()
    }
    assert forward_passes == {"trace-from-step-000001.json": 2, "trace-from-step-000002.json": 4}
    train(spec_with("plain", training__max_steps=4, **ALONE))
    assert not list((tmp_path / "plain").glob("trace-*"))
    plain, profiled = (adapter_tensors(tmp_path / name / "adapter") for name in ("plain", "run"))
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".llamatune-t")]


def test_watching_may_be_turned_on_and_off_between_starts(spec_with: Callable[..., RunSpec], tmp_path: Path) -> None:
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec_with(), on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec_with(training__log_layer_grad_norms=True, training__profile_steps=1))
    assert [line["step"] for line in metrics(tmp_path / "run", "layer_grad_norms")] == [3, 4]
    assert (tmp_path / "run" / "trace-from-step-000003.json").is_file()
