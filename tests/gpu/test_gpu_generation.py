"""Captured decoding steps on a GPU against steps that are launched one by one: tokens, launches, memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraphs
from torch.profiler import ProfilerActivity, profile

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.events import Event, ignore_event, never_stop
from llamatune.inference import captured_steps, sampling
from llamatune.inference.captured_steps import Run
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine, completions
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import open_model
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.transformer import Transformer
from llamatune.shapes import generation_sizes

pytestmark = pytest.mark.gpu

PROMPTS = [[1, *((7 * place + 11 * row) % 120 + 3 for place in range(3 * row % 17))] for row in range(13)]
EOS = frozenset(range(3, 12))
HOW = {"greedy": Sampling(40, 0), "drawn": Sampling(40, 1.0, top_k=50, top_p=0.95, seed=4)}


@pytest.fixture
def captures(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of captures so far, in a list of one; on a CPU operations are recorded in place of graphs."""
    made, graphs_for = [0], captured_steps.graphs_for

    def counted(model: Transformer) -> Any:
        graphs: Any = RecordedGraphs() if device.type == "cpu" else graphs_for(model)
        capture = graphs.capture

        def counting(step: Run) -> Run:
            made[0] += 1
            run: Run = capture(step)
            return run

        graphs.capture = counting
        return graphs

    monkeypatch.setattr(captured_steps, "graphs_for", counted)
    monkeypatch.setattr(captured_steps, "_STEPS_BEFORE", 1)
    monkeypatch.setattr(sampling, "_draws_on_the_host", lambda logits: False)
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 8)
    return made


def without_graphs(make: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_steps, "graphs_for", lambda model: None)
        return make()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["plain", "window", *QUANTIZATIONS])
def test_tokens_are_those_of_steps_that_are_launched_one_by_one(
    device: torch.device, tiny_base: Callable[..., Path], captures: list[int], kind: str, how: str
) -> None:
    """In fp32, where no two logits are so near that another order of addition swaps them; the cache grows."""
    shape = {"model_type": "mistral", "sliding_window": 9} if kind == "window" else {}
    model = load_model(tiny_base(**shape), torch.float32, device, writable=True).eval()
    if kind in QUANTIZATIONS:
        quantize_blocks(model, QUANTIZATIONS[kind], torch.float32)

    def found() -> list[list[Completion]]:
        return [list(completions(model, PROMPTS, HOW[how], EOS, rows)) for rows in (5, 13)]

    expected = without_graphs(found)
    assert captures == [0]
    assert found() == expected
    assert captures[0] > 5
    assert "eos" in {one.finish_reason for one in expected[0]}


def test_base_and_tuned_model_share_captured_steps(
    device: torch.device, tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], captures: list[int]
) -> None:
    base = tiny_base()
    source = ModelSource(base, peft_adapter(base), compare=True, dtype="float32", device=str(device))
    models = open_model(source).load(ignore_event, never_stop)

    def found() -> list[tuple[Completion, ...]]:
        return list(completions_by_model(models, PROMPTS, HOW["drawn"], EOS, 4))

    expected = without_graphs(found)
    assert found() == expected
    assert captures[0] > 2


def test_a_captured_step_is_one_launch(gpu: torch.device, tiny_base: Callable[..., Path]) -> None:
    """And the few for its token: the profiler counts them over 20 steps, with graphs and without."""
    model = load_model(tiny_base(), torch.bfloat16, gpu).eval()

    def counts() -> tuple[int, int]:
        engine = Engine(model, (), 3)
        for prompt in PROMPTS[:3]:
            engine.add(prompt, Sampling(60, 0))
        for _ in range(20):
            engine.step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(20):
                engine.step()
        called = {event.key: event.count for event in profiler.key_averages()}
        kernels = sum(count for name, count in called.items() if "LaunchKernel" in name)
        return called.get("cudaGraphLaunch", 0), kernels

    graphs, kernels = counts()
    none, others = without_graphs(counts)
    assert (graphs, none) == (20, 0)
    assert kernels <= 20 * 20 < others / 2


def test_graphs_and_their_memory_end_with_the_engine(gpu: torch.device, tiny_base: Callable[..., Path]) -> None:
    model = load_model(tiny_base(), torch.bfloat16, gpu).eval()
    held, told = list[int](), list[Event]()
    for _ in range(4):
        list(completions(model, PROMPTS, Sampling(60, 0), (), 8, on_event=told.append))
        gc.collect()
        torch.cuda.synchronize(gpu)
        held.append(torch.cuda.memory_allocated(gpu))
    assert not told, "every capture went well"
    assert all(later == earlier for earlier, later in itertools.pairwise(held[1:]))
