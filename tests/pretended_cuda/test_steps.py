"""Every technique's step and evaluation on a pretended GPU: nothing lies on the wrong device, the host waits once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from techniques import DIMENSIONS, REFUSED, Technique, all_pairs, covering_set, job_of, pairs_of

if TYPE_CHECKING:
    from conftest import Gpu

TO_HOST, TO_DEVICE = "a copy to the host", "a copy to the device"

EACH_TIME = {
    "first window": {("training/training_step.py:make_update", TO_HOST): "losses and norm in one read: is it finite?"},
    "window": {("training/training_step.py:make_update", TO_HOST): "losses and norm in one read: is it finite?"},
    "evaluation": {("model/loss.py:_losses_of_targets", TO_HOST): "the losses of a batch"},
}
"""Where the host waits for the device: once in each part, and at its end."""

ONCE = {
    ("training/model_and_optimizer.py:_draw_base", TO_DEVICE): "weights",
    ("model/adapters/lora.py:LoRALinear.start", TO_DEVICE): "A's first values",
    ("model/adapters/from_base.py:LoRAFromBaseLinear.start", "a number read"): "is a matrix of the base finite?",
    ("model/block_stores.py:HostBlocks.write", TO_HOST): "placement: host, a weight goes to where it will lie",
    ("model/blockwise_8bit.py:BlockwiseCode.__init__", TO_DEVICE): "three tables of an 8-bit code",
    ("model/nf4.py:_pairs_of_levels", TO_DEVICE): "the table of NF4",
}
"""Where it waits besides while the learner is built, and when a table is made for the first pass that needs it."""


def name_of(technique: Technique) -> str:
    return "; ".join(
        value for name, value in technique.items() if value not in ("no", "untied", "device", "in any order")
    )


@pytest.mark.parametrize("technique", covering_set(), ids=name_of)
def test_a_step_stays_on_its_device_and_waits_once(gpu: Gpu, technique: Technique) -> None:
    check(gpu, job_of(technique))


KINDS = {
    "dora on nf4, dropout": ({"kind": "dora"}, {"dtype": "nf4", "trained": "all seven, dropout", "precision": "bf16"}),
    "dora on float8, plain": ({"kind": "dora"}, {"dtype": "float8", "blocks": "plain", "placement": "host"}),
    "dora, recomputed": ({"kind": "dora"}, {"checkpointing": "block", "precision": "fp16"}),
    "pissa": ({"init": "pissa"}, {"dtype": "bfloat16", "precision": "bf16"}),
    "lora_fa": ({"kind": "lora_fa"}, {"optimizer": "adamw_8bit"}),
}


@pytest.mark.parametrize(("lora", "changes"), KINDS.values(), ids=KINDS)
def test_so_does_each_kind_of_adapter(gpu: Gpu, lora: dict[str, str], changes: Technique) -> None:
    job = job_of({**{name: values[0] for name, values in DIMENSIONS.items()}, **changes})
    job["spec"]["lora"] |= lora
    check(gpu, job)


def check(gpu: Gpu, job: dict[str, Any]) -> None:
    found = gpu.run(**job)
    assert found["error"] is None
    waits = {part: {(place, kind): count for place, kind, count in found["waits"][part]} for part in found["waits"]}
    assert waits.keys() == {"building", *EACH_TIME}
    assert waits["building"].keys() <= ONCE.keys()
    for part, expected in EACH_TIME.items():
        assert waits[part].keys() - (ONCE.keys() if part == "first window" else set()) == expected.keys()
        assert [waits[part][wait] for wait in expected] == [1]
    assert not {"cudnn", "math"} & set(found["kernels"])
    assert found["kernels"]


def test_each_pair_of_values_comes_together() -> None:
    techniques = covering_set()
    assert set().union(*map(pairs_of, techniques)) == all_pairs()
    assert len(techniques) < 37, "they take about a second each"


def test_what_is_left_out_is_refused(gpu: Gpu) -> None:
    plain = {name: values[0] for name, values in DIMENSIONS.items()}
    for pair in REFUSED:
        error = gpu.run(**job_of({**plain, **dict(pair)}))["error"]
        assert str(error).startswith(("SpecError: ", "EnvironmentFault: ")), pair
