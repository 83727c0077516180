"""Packed training is unpacked training: the same gradient, whoever shares a row with whom."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_tools import adapter_tensors, make_spec

from llamatune.events import Notice
from llamatune.model.attention import Documents, attend
from llamatune.training.train import train


@pytest.mark.parametrize("budget", [1, 37, 64, 500])
def test_one_update_over_all_rows_is_the_same_packed_or_not(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, budget: int
) -> None:
    changes = {
        "training__max_steps": 1, "training__gradient_accumulation_steps": 64, "training__micro_batch_size": 2,
        "training__optimizer": "sgd", "training__learning_rate": 1.0, "training__max_grad_norm": None,
        "training__precision": "fp32", "lora__dropout": 0.0,
    }  # fmt: skip
    runs = {}
    for name, packing in (("plain", False), ("packed", True)):
        packed = {"data__packing": packing, "data__packed_tokens": budget}
        train(make_spec(tiny_base(), prepared(), tmp_path / name, **changes, **packed))
        runs[name] = adapter_tensors(tmp_path / name / "adapter")
    for name, expected in runs["plain"].items():
        difference = (runs["packed"][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 1e-5, name


def test_a_packed_run_says_what_packing_does_to_an_update(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    told: list[str] = []
    packed = {"data__packing": True, "data__packed_tokens": 64, "training__max_steps": 1}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **packed)
    train(spec, on_event=lambda event: told.append(event.message) if isinstance(event, Notice) else None)
    assert any("samples in each update" in line for line in told)


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 9), (1, 1, 1), (16,)])
def test_attention_stays_inside_each_sample(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    N = sum(lengths)
    q, k, v = torch.randn(1, 6, N, 8), torch.randn(1, 2, N, 8), torch.randn(1, 2, N, 8)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]) & torch.ones(N, N).tril().bool()
    scores = (q @ k.repeat_interleave(3, 1).transpose(2, 3)) / 8**0.5
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    found = attend(q, k, v, None, Documents(lengths, torch.device("cpu")))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_restart_with_each_sample() -> None:
    documents = Documents((3, 1, 2), torch.device("cpu"))
    assert documents.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert documents.bounds.tolist() == [0, 3, 4, 6]
