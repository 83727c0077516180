"""The closed form of a step's memory beside the step itself, on tensors without content and on real ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import step_meter
import torch
from slow_cases import slow
from step_meter import even_batch
from step_tools import real_step, spec_of, step_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from llamatune.data.batches import Batch
from llamatune.events import ignore_event, never_stop
from llamatune.memory.sizes import Rows, Sizes
from llamatune.model import attention
from llamatune.shapes import tile_sizes
from llamatune.shapes.llama_config import LINEAR_MODULES, QKV_MODULES, LlamaConfig
from llamatune.shapes.presets import PRESETS
from llamatune.shapes.recompute_levels import Levels, Recompute, levels_of
from llamatune.training.model_and_optimizer import build_learner

QV = ("q_proj", "v_proj")
TINY = LlamaConfig(64, 160, 3, 4, 2, 96)
SMALL = LlamaConfig(256, 688, 4, 8, 8, 1000)
TIED = LlamaConfig(64, 160, 2, 4, 4, 900, tie_word_embeddings=True)
SEVEN = PRESETS["llama-2-7b"].with_layers(3)

TOLERANCE = 0.05


def predicted(spec: Any, config: LlamaConfig, rows: int, tokens: int, levels: Levels | None = None) -> int:
    targets = rows * max(1, round(tokens * step_meter.TARGET_SHARE))
    with pytest.MonkeyPatch.context() as patch:
        for portions in (
            tile_sizes.WEIGHTS_AT_ONCE,
            tile_sizes.LOGIT_BYTES_AT_ONCE,
            tile_sizes.WIDE_LOGITS_AT_ONCE,
        ):
            patch.setitem(portions, "cpu", portions["cuda"])  # as the gate does
        return step_bytes(spec, config, Rows((tokens,) * rows, targets), cuda=False, levels=levels).peak


def measured(spec: Any, config: LlamaConfig, rows: int, tokens: int, levels: Levels | None = None) -> int:
    batch = even_batch(rows, tokens, step_meter.TARGET_SHARE)
    return step_meter._run(spec, config, batch, levels).peak_bytes


# (config, rows, tokens of each): short samples, a long one, more than one of more than a tile of logits.
SHAPES = [(TINY, 2, 64), (SMALL, 3, 300), (TINY, 1, 4096)]
LORA = [
    (SHAPES[number % 3], dtype, precision, targets, mode, dropout)
    for number, ((dtype, precision), (targets, mode, dropout)) in enumerate(
        itertools.product(
            (("bfloat16", "bf16"), ("float32", "fp32"), ("float32", "bf16"), ("bfloat16", "fp32")),
            ((QV, "none", 0.1), (LINEAR_MODULES, "projections", 0.0), (LINEAR_MODULES, "block", 0.1),
             (LINEAR_MODULES, "every_2", 0.0), (QV, "sublayer", 0.0), (LINEAR_MODULES, "attention", 0.1),
             (LINEAR_MODULES, "none", 0.0)),
        )
    )
] + [(SHAPES[1], dtype, "bf16", LINEAR_MODULES, "projections", 0.0) for dtype in ("nf4", "float8")]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "precision", "targets", "mode", "dropout"),
    [slow(*case) if place % 4 else case for place, case in enumerate(LORA)],
)
def test_fused_lora(
    shape: tuple[LlamaConfig, int, int],
    dtype: str,
    precision: str,
    targets: tuple[str, ...],
    mode: str,
    dropout: float,
) -> None:
    spec = spec_of(targets, mode, dropout, dtype=dtype, precision=precision, gradient_accumulation_steps=2)
    tolerance = 2 * TOLERANCE if shape is SHAPES[0] else TOLERANCE  # where a hundred KiB are ten percent
    assert predicted(spec, *shape) == pytest.approx(measured(spec, *shape), rel=tolerance)


@pytest.mark.parametrize(
    ("targets", "dtype", "precision", "mode"),
    [(*kind, mode) for kind in ((QV, "bfloat16", "bf16"), (LINEAR_MODULES, "float32", "fp32"), ((), "float32", "fp32"),
                                ((), "float32", "bf16")) for mode in ("none", "block", "sublayer")]
    + [(LINEAR_MODULES, "float32", "bf16", mode) for mode in ("every_2", "attention", "feed_forward")],
)  # fmt: skip
def test_plain_modules(targets: tuple[str, ...], dtype: str, precision: str, mode: str) -> None:
    spec = spec_of(targets, mode, 0.1, dtype=dtype, precision=precision, fused=False)
    assert predicted(spec, SMALL, 1, 512) == pytest.approx(measured(spec, SMALL, 1, 512), rel=TOLERANCE)


QWEN_2 = LlamaConfig(256, 688, 2, 8, 2, 500, biased_modules=QKV_MODULES)
QWEN_3 = LlamaConfig(256, 688, 2, 8, 2, 500, head_dim=64, head_norms=True)
HOW = [
    (QV, "bfloat16", "bf16", "none", True), (LINEAR_MODULES, "float32", "bf16", "projections", True),
    (LINEAR_MODULES, "float32", "fp32", "block", True), (LINEAR_MODULES, "nf4", "bf16", "attention", True),
    (("k_proj",), "bfloat16", "bf16", "none", False), (LINEAR_MODULES, "float32", "fp32", "sublayer", False),
    (LINEAR_MODULES, "nf4", "bf16", "none", False), ((), "float32", "fp32", "none", False),
    ((), "float32", "bf16", "block", False),
]  # fmt: skip
ALWAYS = {(QWEN_2, HOW[7]), (QWEN_3, HOW[1]), (QWEN_3, HOW[4])}


@pytest.mark.parametrize(
    ("config", "how"),
    [case if case in ALWAYS else slow(*case) for case in itertools.product((QWEN_2, QWEN_3), HOW)],
    ids=lambda value: str(value[1:]) if isinstance(value, tuple) else "qwen 3" if value.head_norms else "qwen 2",
)  # fmt: skip
def test_biases_and_norms_of_heads(config: LlamaConfig, how: tuple[tuple[str, ...], str, str, str, bool]) -> None:
    targets, dtype, precision, mode, fused = how
    spec = spec_of(targets, mode, 0.1, dtype=dtype, precision=precision, fused=fused)
    assert predicted(spec, config, 2, 300) == pytest.approx(measured(spec, config, 2, 300), rel=TOLERANCE)


@pytest.mark.parametrize("config", [QWEN_2, QWEN_3], ids=["qwen 2", "qwen 3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "nf4", "float8", "int8"])
def test_the_base_is_counted_to_the_last_bias(config: LlamaConfig, dtype: str) -> None:
    spec = spec_of(QV, dtype=dtype, precision="fp32" if dtype == "float32" else "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = step_meter._inputs_without_data(spec, config)
        model = build_learner(spec, inputs, ignore_event, never_stop).model
    held = [x for name, x in model.state_dict().items() if "lora_" not in name]
    found = step_bytes(spec, config, Rows((8,), 4), cuda=False).weights
    assert found == sum(tensor.numel() * tensor.element_size() for tensor in held)


KINDS: list[tuple[dict[str, Any], str, str, bool, str]] = [
    ({"kind": "dora"}, "nf4", "bf16", True, "block"),
    ({"kind": "dora", "dropout": 0.1}, "bfloat16", "bf16", True, "none"),
    ({"kind": "dora", "dropout": 0.1}, "bfloat16", "bf16", False, "none"),
    ({"kind": "lora_fa", "r": 64}, "float32", "bf16", False, "none"),
    ({"init": "pissa", "ranks": {"q_proj": 64, "down_proj": 200}}, "bfloat16", "bf16", True, "none"),
]
MORE_KINDS: list[tuple[dict[str, Any], str, str, bool, str]] = [
    ({"kind": "dora"}, "bfloat16", "bf16", True, "none"),
    ({"kind": "dora", "dropout": 0.1}, "float32", "fp32", True, "projections"),
    ({"kind": "dora"}, "bfloat16", "bf16", False, "sublayer"),
    ({"kind": "lora_fa", "dropout": 0.1}, "float32", "fp32", True, "block"),
    ({"kind": "lora_fa", "dropout": 0.1}, "float32", "fp32", False, "block"),
    ({"init": "olora", "ranks": {"q_proj": 64, "down_proj": 200}}, "bfloat16", "bf16", False, "none"),
    ({"ranks": {"q_proj": 64, "down_proj": 200}, "dropout": 0.1}, "bfloat16", "bf16", True, "none"),
]


@pytest.mark.parametrize(
    ("lora", "dtype", "precision", "fused", "mode"),
    [*KINDS, *(slow(*case) for case in MORE_KINDS)],
)
def test_kinds_of_adapter(lora: dict[str, Any], dtype: str, precision: str, fused: bool, mode: str) -> None:
    spec = spec_of(LINEAR_MODULES, mode, dtype=dtype, precision=precision, fused=fused, lora=lora)
    config = SMALL.with_layers(2)
    assert predicted(spec, config, 1, 512) == pytest.approx(measured(spec, config, 1, 512), rel=TOLERANCE)


def test_lora_fa_trains_less_and_its_plain_modules_keep_no_input() -> None:
    rows = Rows((512,), 128)
    for fused in (True, False):
        lora, fa = (
            step_bytes(spec_of(LINEAR_MODULES, fused=fused, lora=lora), SEVEN, rows, cuda=True)
            for lora in ({}, {"kind": "lora_fa"})
        )
        trained = sum(Sizes(spec_of(LINEAR_MODULES, lora={"kind": "lora_fa"}), SEVEN, rows, True).trained_counts)
        assert fa.optimizer_state == 8 * trained + 4 * 7 * 3
        assert fa.optimizer_state < 0.6 * lora.optimizer_state
        assert (fa.activations < 0.8 * lora.activations) is not fused
        assert fa.peak < lora.peak


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["", "tied"])
def test_every_parameter_trained(config: LlamaConfig, optimizer: str, accumulation: int) -> None:
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    spec = spec_of((), dtype="float32", optimizer=optimizer, gradient_accumulation_steps=accumulation, **momentum)
    tolerance = 2 * TOLERANCE if optimizer == "adamw_8bit" else TOLERANCE  # its buckets are not all full
    assert predicted(spec, config, 2, 96) == pytest.approx(measured(spec, config, 2, 96), rel=tolerance)


@pytest.mark.parametrize(
    ("targets", "dtype", "mode", "rows"),
    [(QV, "bfloat16", "none", 8), (LINEAR_MODULES, "bfloat16", "projections", 8), (LINEAR_MODULES, "nf4", "block", 8),
     (QV, "float8", "none", 1),
     (LINEAR_MODULES, "float32", "feed_forward", 1)],
)  # fmt: skip
def test_blocks_of_7b(targets: tuple[str, ...], dtype: str, mode: str, rows: int) -> None:
    spec = spec_of(targets, mode, dtype=dtype)
    assert predicted(spec, SEVEN, rows, 512) == pytest.approx(measured(spec, SEVEN, rows, 512), rel=TOLERANCE)


@pytest.mark.parametrize("levels", [(3, 2, 1, 0), (3, 3, 0, 0), (2, 1, 1, 0)], ids=str)
def test_levels_may_differ_from_block_to_block(levels: tuple[int, ...]) -> None:
    spec, chosen = spec_of(LINEAR_MODULES, dropout=0.1), tuple(map(Recompute, levels))
    assert predicted(spec, SMALL, 2, 300, chosen) == pytest.approx(measured(spec, SMALL, 2, 300, chosen), rel=TOLERANCE)


@pytest.mark.parametrize("lengths", [(40, 23, 77, 31), (300, 12, 280, 50)], ids=str)
@pytest.mark.parametrize(("kind", "mode"), [("fused", "none"), ("fused", "projections"), ("fused", "block"),
                                            ("plain", "none"), ("full", "block")])  # fmt: skip
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_samples_of_several_lengths_on_real_tensors(
    lengths: tuple[int, ...], kind: str, mode: str, dtype: str, precision: str
) -> None:
    targets = () if kind == "full" else LINEAR_MODULES
    held = "float32" if kind == "full" else dtype
    spec = spec_of(targets, mode, 0.1, dtype=held, precision=precision, fused=kind != "plain")
    ids = torch.randint(3, 90, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, ::2] = -100
    labels[:, torch.tensor(lengths).cumsum(0) - 1] = ids[:, torch.tensor(lengths).cumsum(0) - 1]
    target_tokens = int((labels != -100).sum())
    batch = Batch(ids, labels, lengths, tuple(range(len(lengths))), target_tokens)
    _, meter = real_step(spec, SMALL, batch)
    found = step_bytes(spec, SMALL, Rows(lengths, target_tokens), cuda=False).peak
    assert found == pytest.approx(meter.peak_bytes, rel=TOLERANCE)


@pytest.mark.parametrize("capability", [None, (9, 0)], ids=["CPU", "GPU"])
@pytest.mark.parametrize(("fused", "mode"), [(True, "none"), (True, "projections"), (False, "none"), (True, "block")])
@pytest.mark.parametrize("lengths", [(300, 300), (601,), (40, 301, 77)], ids=str)
def test_samples_beyond_a_sliding_window(
    monkeypatch: pytest.MonkeyPatch, capability: Any, fused: bool, mode: str, lengths: tuple[int, ...]
) -> None:
    config = LlamaConfig(256, 688, 4, 8, 2, 1000, sliding_window=100)
    spec = spec_of(LINEAR_MODULES, mode, dtype="bfloat16", precision="bf16", fused=fused)
    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    ids = torch.randint(3, 90, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids.clone(), lengths, tuple(range(len(lengths))), sum(lengths) - len(lengths))
    _, meter = real_step(spec, config, batch)
    training = spec.training.model_copy(update={"kernels": "plain"})  # as a CPU computes
    plain = spec.model_copy(update={"training": training})
    found = step_bytes(plain, config, Rows(lengths, batch.target_tokens), capability or False).peak
    assert found == pytest.approx(meter.peak_bytes, rel=0.06)


@pytest.mark.parametrize("saved", [{"dtype": "nf4"}, {"optimizer": "adamw_8bit"}], ids=str)
def test_a_kernel_has_less_in_flight(saved: dict[str, Any]) -> None:
    """What unpacks NF4, what 8-bit AdamW works in, and the wide logits, are counted for plain functions alone."""
    values = {"precision": "bf16", "dtype": "bfloat16", **saved}
    spec = spec_of(LINEAR_MODULES, **values)
    plain = spec.model_copy(update={"training": spec.training.model_copy(update={"kernels": "plain"})})
    rows = Rows((512,) * 4, 1024)
    assert step_bytes(spec, SEVEN, rows, (8, 0)).peak < step_bytes(plain, SEVEN, rows, (8, 0)).peak
    for gpu in ((7, 5), False):  # where no kernel runs
        assert step_bytes(spec, SEVEN, rows, gpu).peak == step_bytes(plain, SEVEN, rows, gpu).peak


@pytest.mark.parametrize(("rows", "tokens"), [slow(1, 300), (3, 200)])
@pytest.mark.parametrize(
    ("fused", "mode"), [(True, "none"), slow(True, "projections"), (False, "none"), (True, "block")]
)
@pytest.mark.parametrize("hidden", [256, 240], ids=["heads of 32", "heads of 30, filled up"])
def test_a_gpu_that_wants_keys_and_values_repeated(
    monkeypatch: pytest.MonkeyPatch, hidden: int, fused: bool, mode: str, rows: int, tokens: int
) -> None:
    config = LlamaConfig(hidden, 688, 4, 8, 2, 1000)
    spec = spec_of(LINEAR_MODULES, mode, dtype="float32", precision="fp32", fused=fused)
    monkeypatch.setattr(attention, "capability_of", lambda device: (9, 0))
    targets = rows * max(1, round(tokens * step_meter.TARGET_SHARE))
    found = step_bytes(spec, config, Rows((tokens,) * rows, targets), (9, 0)).peak
    assert found == pytest.approx(measured(spec, config, rows, tokens), rel=TOLERANCE)


def test_categories_are_what_they_are_called() -> None:
    spec = spec_of(LINEAR_MODULES, gradient_accumulation_steps=2)
    found = step_bytes(spec, SEVEN, Rows((512,), 100), cuda=True)
    trained = sum(Sizes(spec, SEVEN, Rows((1,), 1), cuda=True).trained_counts)
    assert trained == 3 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found.weights == 2 * (3 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096)
    assert found.adapter == 6 * trained  # in fp32, and as they are cast for the products of a window
    assert 4 * trained <= found.gradients <= 8 * trained  # of the first pass all, of the second some
    assert found.optimizer_state == 8 * trained + 4 * 2 * 7 * 3
    assert found.peak == sum(vars(found).values())


def test_the_modes_name_the_levels_of_the_functions() -> None:
    assert levels_of("none", 2) == (Recompute.NOTHING,) * 2
    assert levels_of("feed_forward", 2) == levels_of("sublayer", 2) == (Recompute.FEED_FORWARD,) * 2
    assert levels_of("projections", 2) == (Recompute.PROJECTIONS,) * 2
    assert levels_of("block", 2) == (Recompute.BLOCK,) * 2
    assert levels_of("every_2", 5) == (0, 3, 0, 3, 0)
