"""Generation and both evaluations run the device's kernels; here Triton's interpreter takes the place of a GPU."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.command_options.inference import EvaluateOptions, ModelSource, Sampling
from llamatune.events import OnEvent
from llamatune.inference import model_source
from llamatune.inference.evaluate import evaluate_prepared
from llamatune.inference.generate import generate
from llamatune.inference.gsm8k import evaluate_gsm8k
from llamatune.model.kernels import choice


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel ran."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    counts: Counter[str] = Counter()
    find = choice._kernel

    def counted(file: str, name: str) -> Callable[..., Any]:
        counts[name] += 1
        return find(file, name)

    @contextlib.contextmanager
    def interpreted(wanted: str, device: torch.device, on_event: OnEvent) -> Iterator[None]:
        assert wanted == "auto"
        with choice.running_kernels(device.type):
            yield

    monkeypatch.setattr(choice, "_kernel", counted)
    monkeypatch.setattr(model_source, "chosen_kernels", interpreted)
    return counts


def test_held_out_loss(base: Path, prepared: Callable[..., Path], ran: Counter[str]) -> None:
    options = EvaluateOptions(model=base, data=prepared(), limit=3, device="cpu")
    found = evaluate_prepared(options).scores[""]
    assert ran["token_losses"] == 1
    assert ran["swiglu"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_source, "chosen_kernels", lambda *_: contextlib.nullcontext())
        expected = evaluate_prepared(options).scores[""]
    assert ran["token_losses"] == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert math.isclose(ours.summed_loss, theirs.summed_loss, rel_tol=1e-5)
        assert ours.correct_tokens == theirs.correct_tokens


def test_generation(base: Path, ran: Counter[str]) -> None:
    generate(ModelSource(base, device="cpu"), ["a red llama"], Sampling(max_new_tokens=2))
    assert ran["swiglu"] > 0


def test_gsm8k(base: Path, ran: Counter[str], tmp_path: Path) -> None:
    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"question": "How many?", "answer": "#### 2"}) + "\n")
    evaluate_gsm8k(EvaluateOptions(model=base, data=rows, task="gsm8k", max_new_tokens=2, device="cpu"))
    assert ran["swiglu"] > 0
