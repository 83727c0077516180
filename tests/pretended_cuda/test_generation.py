"""Generation on a pretended GPU: a token costs one read, and no part of it keeps a matrix of scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from planted_faults import STEP_FAULTS

from llamatune.inference.captured_steps import _STEPS_BEFORE

if TYPE_CHECKING:
    from conftest import Gpu

TOKENS = 4
TO_HOST, TO_DEVICE = "a copy to the host", "a copy to the device"
BEAMS = "inference/beam_search.py:beam_search"

LOADING = {
    ("checkpoints/loading.py:load_model", TO_DEVICE),  # weights, as they come from the disk
    ("checkpoints/tensor_bytes.py:is_finite", "a number read"),  # of each
    ("model/adapters/lora.py:LoRALinear.start", TO_DEVICE),
}
SAMPLING = {
    ("inference/sampling.py:next_tokens", TO_HOST): TOKENS,  # tokens, whether drawn or the likeliest
    ("inference/engine.py:Engine._read", TO_DEVICE): 1,  # prompts and their ends
    ("inference/engine.py:Engine._plain_step", TO_DEVICE): TOKENS - 1,  # tokens and their places: nothing is queued
}
BEAM_SEARCH = {
    (BEAMS, TO_HOST): 2 * TOKENS,  # scores and places of the best: nothing is queued before the second
    (BEAMS, TO_DEVICE): TOKENS,  # scores
    ("inference/beam_search.py:_BeamTree.begin", TO_DEVICE): 1,  # the prompt
    ("inference/beam_search.py:_BeamTree.extend", TO_DEVICE): TOKENS - 1,  # tokens, and which beams they go on from
}
"""Where the host waits, and how often: of ``TOKENS`` tokens."""

GREEDY: dict[str, Any] = {"temperature": 0}
DRAWN = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
H100, A100, T4 = (9, 0), (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "sampling", "prompts", "adapter"),
    [
        (H100, "bfloat16", GREEDY, [6], True),
        (H100, "float32", DRAWN, [3, 7, 1], True),
        (H100, "float16", {"num_beams": 3}, [5], False),
        (A100, "bfloat16", DRAWN, [5, 5], False),
        (A100, "float32", {"num_beams": 3}, [5], True),
        (A100, "float16", GREEDY, [3, 7, 1], False),
        (T4, "float32", GREEDY, [5, 5], False),
        (T4, "float16", DRAWN, [3, 7, 1], True),
        (T4, "float16", {"num_beams": 3}, [5], True),
    ],
)
def test_a_token_is_read_once(
    gpu: Gpu,
    small_base: Path,
    capability: tuple[int, int],
    dtype: str,
    sampling: dict[str, Any],
    prompts: list[int],
    adapter: bool,
) -> None:
    job = {"dtype": dtype, "sampling": sampling, "lengths": prompts, "tokens": TOKENS, "adapter": adapter}
    found = gpu.run(kind="generation", capability=capability, base=str(small_base), compare=False, merge=False, **job)
    assert found["error"] is None
    waits = {part: {(place, kind): count for place, kind, count in found["waits"][part]} for part in found["waits"]}
    assert waits["loading"].keys() <= LOADING
    assert waits["generation"] == (BEAM_SEARCH if "num_beams" in sampling else SAMPLING)
    assert found["kernels"]
    assert not {"cudnn", "math"} & set(found["kernels"])


@pytest.mark.parametrize(("rows", "dtype"), [(1, "bfloat16"), (3, "float32")])
def test_a_cell_of_the_benchmark_reads_no_more_than_its_batches(
    gpu: Gpu, small_base: Path, rows: int, dtype: str
) -> None:
    job = {"dtype": dtype, "rows": rows, "tokens": TOKENS, "repetitions": 2}
    found = gpu.run(kind="generation cell", capability=H100, base=str(small_base), **job)
    assert found["error"] is None
    waits = {(place, kind): count for place, kind, count in found["waits"]["cell"]}
    batches = 3  # one of warm-up
    assert {wait: count for wait, count in waits.items() if wait not in LOADING} == {
        wait: batches * count for wait, count in SAMPLING.items()
    }


@pytest.mark.parametrize(("prompts", "sampling"), [([6], GREEDY), ([3, 7, 1], DRAWN)])
def test_base_and_tuned_model_share_a_pass_and_its_reads(
    gpu: Gpu, small_base: Path, prompts: list[int], sampling: dict[str, Any]
) -> None:
    """Beside them, the switch is copied to the device when it changes: after the prompts, and never among tokens."""
    job = {"dtype": "bfloat16", "sampling": sampling, "lengths": prompts, "tokens": TOKENS, "adapter": True}
    found = gpu.run(kind="generation", capability=H100, base=str(small_base), compare=True, merge=False, **job)
    assert found["error"] is None
    waits = {(place, kind): count for place, kind, count in found["waits"]["generation"]}
    assert waits == {**SAMPLING, ("model/adapters/adapter_switch.py:AdapterSwitch.set", TO_DEVICE): 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_is_done_on_the_device_and_read_once_for_each_layer(gpu: Gpu, small_base: Path, dtype: str) -> None:
    job = {"dtype": dtype, "sampling": GREEDY, "lengths": [6], "tokens": TOKENS, "adapter": True}
    found = gpu.run(kind="generation", capability=H100, base=str(small_base), compare=False, merge=True, **job)
    assert found["error"] is None
    waits = {(place, kind): count for place, kind, count in found["waits"]["loading"]}
    merging = {(place, kind): count for (place, kind), count in waits.items() if "merged_layer" in place}
    assert merging == {("model/adapters/merged_layer.py:merged_layer", TO_HOST): 4}  # two layers of two blocks


AWAITED = ("inference/host_copies.py:fetched.numbers", "an event awaited")
"""The tokens of a step that was launched before the one after it was."""


@pytest.mark.parametrize(
    ("capability", "dtype", "sampling", "prompts", "adapter", "compare"),
    [
        (H100, "bfloat16", GREEDY, [6], False, False),
        (H100, "float8", DRAWN, [3, 7, 1], True, False),
        (A100, "int8", GREEDY, [3, 7, 1], True, True),
        (A100, "nf4", DRAWN, [5, 5], False, False),
    ],
)
def test_a_captured_step_neither_waits_nor_reads_the_host(
    gpu: Gpu,
    small_base: Path,
    capability: tuple[int, int],
    dtype: str,
    sampling: dict[str, Any],
    prompts: list[int],
    adapter: bool,
    compare: bool,
) -> None:
    """Its tokens are awaited one by one, each after the launch of the next; nothing else is waited for."""
    tokens, before = 24, _STEPS_BEFORE
    job = {"dtype": dtype, "sampling": sampling, "lengths": prompts, "tokens": tokens, "adapter": adapter}
    found = gpu.run(kind="generation", capability=capability, base=str(small_base), compare=compare, merge=False, **job)
    assert found["error"] is None
    waits = {(place, kind): count for place, kind, count in found["waits"]["generation"]}
    captured = tokens - 1 - before
    plain = {place: count - TOKENS + 1 + before for place, count in SAMPLING.items()}
    plain["inference/engine.py:Engine._read", TO_DEVICE] = 1
    if compare:
        plain["model/adapters/adapter_switch.py:AdapterSwitch.set", TO_DEVICE] = 2  # of the prompts and the first step
    if dtype == "nf4":
        plain["model/nf4.py:_pairs_of_levels", TO_DEVICE] = 1  # a table, for the first prompts
    assert waits == {**plain, AWAITED: captured}
    assert found["replays"] == captured
    assert not {"cudnn", "math"} & set(found["kernels"])


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_what_cannot_be_captured_is_seen(gpu: Gpu, small_base: Path, fault: str) -> None:
    job = {"dtype": "bfloat16", "sampling": GREEDY, "lengths": [6], "tokens": 24, "adapter": False, "fault": fault}
    found = gpu.run(kind="generation", capability=H100, base=str(small_base), compare=False, merge=False, **job)
    assert found["error"].startswith("CaptureFault")
