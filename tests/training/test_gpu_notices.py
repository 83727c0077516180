"""What a run on a GPU reports before its weights are loaded: slower settings, and why its base lies in host memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from listed_gpus import H100, T4, Gpus
from run_tools import make_spec

import llamatune
from llamatune.events import Notice
from llamatune.memory.plan import heaviest_rows, plan_memory, with_kernels
from llamatune.memory.remedies import remedies
from llamatune.ranks import ALONE
from llamatune.shapes.presets import preset
from llamatune.spec import RunSpec, build_spec
from llamatune.training.run_memory import choose_run_placement, plan_run_memory, report_plan
from llamatune.training.train import plan_training, train

GPU, GIB = torch.device("cuda"), 1 << 30


class Loading(Exception):
    """Weights would be loaded now."""


@pytest.mark.parametrize(
    ("gpu", "precision", "dtype", "expected"),
    [
        (H100, "fp32", "float32", "training.precision: fp32 does not use the tensor cores"),
        (H100, "fp16", "float16", "training.precision: fp16 may overflow"),
        (H100, "bf16", "float32", "model.dtype: float32 is cast to bfloat16"),
        (H100, "bf16", "bfloat16", None),
        (T4, "fp16", "float16", None),
    ],
)
def test_slower_settings_are_told_once_before_weights_are_loaded(
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    gpu: tuple[str, tuple[int, int]],
    precision: str,
    dtype: str,
    expected: str | None,
) -> None:
    gpus(gpu)

    def load(*args: Any, **more: Any) -> None:
        raise Loading

    monkeypatch.setattr("llamatune.training.train.build_learner", load)
    how: dict[str, Any] = {"training__device": "auto", "training__kernels": "plain"}
    how |= {"training__precision": precision, "model__dtype": dtype}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **how)
    for start in (train, plan_training):
        told: list[Any] = []
        if start is train:
            with pytest.raises(Loading):
                start(spec, on_event=told.append)
        else:
            (tmp_path / "run").rename(tmp_path / "before")
            start(spec, on_event=told.append)
        lines = [event.message for event in told if isinstance(event, Notice) and "a CPU" not in event.message]
        about = [line for line in lines if line.startswith(("training.precision", "model.dtype"))]
        assert [line[: len(expected or "")] for line in about] == ([] if expected is None else [expected])


def with_limit(spec: RunSpec, limit: str) -> RunSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update={"memory_limit": limit})})


@pytest.mark.parametrize(
    ("asked", "fault", "runs"), [("auto", None, "auto"), ("auto", "no C compiler", "plain"), ("plain", None, "plain")]
)
def test_memory_is_planned_for_the_kernels_that_run(
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    asked: str,
    fault: str | None,
    runs: str,
) -> None:
    gpus(H100)
    planned = []

    def load(spec: RunSpec, *args: Any, **more: Any) -> None:
        planned.append(spec.training.kernels)
        raise Loading

    monkeypatch.setattr("llamatune.training.train.build_learner", load)
    monkeypatch.setattr("llamatune.model.kernels.choice.kernel_fault", lambda device: fault)
    how: dict[str, Any] = {"training__device": "auto", "training__kernels": asked, "training__precision": "bf16"}
    how |= {"model__dtype": "nf4", "training__optimizer": "adamw_8bit"}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **how)
    dry = plan_training(spec)["memory_plan"]["predicted_peak_memory_bytes"]
    with pytest.raises(Loading):
        train(spec)
    assert planned == [runs]
    if runs == asked:  # else plan-memory cannot know it
        asked_of = with_limit(spec, "1GiB")
        assert plan_training(asked_of)["memory_plan"] == llamatune.plan_memory(asked_of)
    plain = with_kernels(spec, "plain")
    assert (dry == plan_training(plain)["memory_plan"]["predicted_peak_memory_bytes"]) == (runs == "plain")


@pytest.mark.parametrize(
    ("placement", "limit", "expected"),
    [
        ("auto", "12GiB", r"lie in host memory, because a step with all of them on cuda needs about 12\.\S+ GiB "
         r"of 12\.00 GiB that may be used; two are on cuda at a time; all fit there with model\.dtype=float8 .*: "
         r"about \d"),
        ("host", "12GiB", r"lie in host memory; two are on cuda at a time$"),
        ("auto", "24GiB", None),
    ],
)  # fmt: skip
def test_where_the_base_lies_is_told_with_why_and_what_else_would_do(
    gpus: Gpus, placement: str, limit: str, expected: str | None
) -> None:
    gpus(H100)
    values: dict[str, Any] = {"model": {"path": "x", "placement": placement}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "memory_limit": limit}}, "test")
    config, train_split = preset("llama-2-7b"), SimpleNamespace(lengths=[512] * 8, target_counts=[512] * 8)
    chosen = choose_run_placement(spec, config, train_split, GPU, None, ALONE)  # type: ignore[arg-type]
    # Streamed blocks leave room for joined rows; the advice is for the rows of the spec.
    plan = plan_run_memory(chosen, config, train_split, GPU, 4096)  # type: ignore[arg-type]
    told: list[Any] = []
    report_plan(plan, spec, chosen, config, train_split, GPU, told.append)  # type: ignore[arg-type]
    lines = [event.message for event in told if "lie in" in event.message]
    assert len(lines) == (expected is not None)
    assert expected is None or re.search(expected, lines[0])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "model.dtype=float16 training.precision=fp16"), ((8, 0), "model.dtype=bfloat16 training.precision=bf16")],
)
def test_no_remedy_asks_for_what_the_gpu_lacks(capability: tuple[int, int], expected: str) -> None:
    values: dict[str, Any] = {"model": {"path": "x", "dtype": "float32"}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "precision": "fp32"}}, "test")
    config = preset("llama-2-7b")
    plan = plan_memory(spec, config, heaviest_rows([512], [512], spec), capability, 16 * GIB)
    assert expected in [remedy.change for remedy in remedies(spec, config, plan, capability)]
