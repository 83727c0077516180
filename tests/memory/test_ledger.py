"""The ledger's arithmetic, and that the moments of a step lead to the peak that is planned for."""

from __future__ import annotations

import itertools

import pytest
from step_tools import spec_of

from llamatune.memory.ledger import Ledger, Part, Passes
from llamatune.memory.sizes import Rows
from llamatune.memory.step import Step
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig

CONFIG = LlamaConfig(64, 160, 4, 4, 2, 96)


def test_the_highest_moment_of_each_step_and_what_is_alive_there() -> None:
    ledger = Ledger()
    x = ledger.make("x", 5)
    with ledger.step("again"):
        with ledger.step("q, k"):
            q = ledger.make("q", 10)
            ledger.use("cast", 7)
            k = ledger.make("k", 3)
            ledger.free(q)
        ledger.use("o", 1)
    with ledger.step("end"):
        ledger.free(x)
        ledger.use("y", 2)
        ledger.use("nothing", 0)
    found = [(moment.step, moment.bytes, dict(moment.tensors)) for moment in ledger.take_moments()]
    assert found == [
        ("again: q, k", 22, {"x": 5, "q": 10, "cast": 7}),
        ("again", 9, {"x": 5, "k": 3, "o": 1}),
        ("end", 5, {"k": 3, "y": 2}),
    ]
    assert (ledger.alive(), ledger.live_bytes) == ((("k", 3),), 3)
    assert ledger.take_moments() == ()
    ledger.free(k)
    with pytest.raises(KeyError):
        ledger.free(k)


def leaky(ledger: Ledger) -> Passes:
    with ledger.step("make"):
        kept = ledger.keep("kept", 4)
    yield
    with ledger.step("back"):
        ledger.make("forgotten", 2)
    ledger.free(kept)


def test_a_walk_that_frees_less_than_it_makes_is_refused() -> None:
    with pytest.raises(AssertionError, match="forgotten"):
        Part.of("leaky", leaky, gradients=0)


@pytest.mark.parametrize("mode", ["none", "block", "every_2", "attention", "feed_forward", "sublayer", "projections"])
@pytest.mark.parametrize("kind", ["fused", "plain", "full"])
def test_the_highest_moment_is_the_peak_and_its_tensors_add_up(kind: str, mode: str) -> None:
    if (kind != "fused") and mode == "projections":
        pytest.skip("plain blocks do not know this mode")
    targets = () if kind == "full" else LINEAR_MODULES
    for dtype, precision, tokens, accumulation in itertools.product(
        ("float32", "bfloat16"), ("bf16", "fp32"), (30, 4096), (1, 2)
    ):
        held = "float32" if kind == "full" else dtype
        spec = spec_of(targets, mode, 0.1, dtype=held, precision=precision, fused=kind == "fused",
                       gradient_accumulation_steps=accumulation)  # fmt: skip
        step = Step(spec, CONFIG, Rows((tokens, 7), tokens // 2), cuda=False)
        moments = step.moments()
        assert max(moment.memory.peak for moment in moments) == step.highest().peak
        for moment in moments:
            assert sum(moment.alive.values()) == moment.memory.peak, (moment.phase, moment.part, moment.step)
        in_blocks = [moment for moment in moments if moment.layers and moment.phase == "forward"]
        assert {layer for moment in in_blocks for layer in moment.layers} == set(range(4))
        assert [moment.phase for moment in moments] == sorted(
            (moment.phase for moment in moments), key=("forward", "backward", "update").index
        )
