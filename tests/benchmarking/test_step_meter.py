"""The memory of a step: the meter against known sizes, its step against autograd's own hooks, 7B's bounds."""

from __future__ import annotations

import pytest
import step_meter
import torch
from slow_cases import slow
from step_meter import StepMeter, even_batch, measure_step
from step_tools import real_step, saved_by_autograd, spec_of
from torch._subclasses.fake_tensor import FakeTensorMode

from llamatune.events import ignore_event, never_stop
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.presets import PRESETS
from llamatune.spec import RunSpec
from llamatune.training.model_and_optimizer import build_learner

GIB, KIB = 1 << 30, 1 << 10
QV = ("q_proj", "v_proj")
TINY = LlamaConfig(64, 160, 3, 4, 4, 96)

# LLaMA-2-7B, bf16 base, fp32 adapters of r=16 and AdamW's state, 46 % of the tokens trained, no dropout. What a setting
# may take at most: GiB of tensors at the peak, KiB saved per token and layer. Tighten what gets better.
# (targets, rows, row tokens, activation_checkpointing, model.dtype): (peak GiB, saved KiB)
AT_MOST = {
    (QV, 1, 512, "none", "bfloat16"): (14.3, 96),
    (LINEAR_MODULES, 1, 512, "none", "bfloat16"): (14.6, 96),
    (QV, 8, 512, "none", "bfloat16"): (24.3, 96),
    (LINEAR_MODULES, 8, 512, "none", "bfloat16"): (24.6, 96),
    (LINEAR_MODULES, 8, 512, "projections", "bfloat16"): (16.4, 25),
    (QV, 8, 512, "block", "bfloat16"): (14.2, 8.1),
    (QV, 8, 2048, "block", "bfloat16"): (18.0, 8.1),
    (QV, 1, 512, "none", "nf4"): (5.4, 96),
    (LINEAR_MODULES, 8, 512, "block", "nf4"): (5.8, 8.1),
}
QUICK = {setting for setting in AT_MOST if setting[0] == QV and setting[3:] == ("none", "bfloat16")}
"""The others take up to a minute each."""


class TestTheMeter:
    def test_a_storage_counts_once_until_its_last_view_is_gone(self) -> None:
        with StepMeter() as meter:
            x = torch.zeros(1000)
            assert meter.live_bytes == 4000
            views = [x.view(10, 100), x[3:], x.t(), x.detach(), x.add_(1)]
            assert (meter.live_bytes, meter.peak_bytes) == (4000, 4000)
            y = x.double()
            assert meter.live_bytes == 12000
            del x
            assert meter.live_bytes == 12000, "views hold it"
            del views
            assert meter.live_bytes == 8000
            del y
        assert (meter.live_bytes, meter.peak_bytes, meter.largest_bytes) == (0, 12000, 8000)

    def test_what_an_expression_makes_on_its_way_is_in_the_peak(self) -> None:
        with FakeTensorMode(), StepMeter() as meter:
            x = torch.empty(1 << 28)  # 1 GiB that nobody has to have
            meter.start_window()
            y = (x * 2 + 1).sum()
        assert meter.peak_bytes == 3 * GIB
        assert meter.live_bytes == GIB + y.element_size()

    def test_a_resized_storage_has_its_new_size(self) -> None:
        with StepMeter() as meter:
            x = torch.zeros(10)
            x.resize_(1000)
            assert meter.live_bytes == 4000

    def test_what_autograd_keeps_is_alive_when_backward_begins(self) -> None:
        weight = torch.zeros(30, 50, requires_grad=True)
        with StepMeter() as meter:
            x = torch.ones(20, 50)
            hidden = x @ weight.t()  # keeps x
            loss = hidden.exp().sum()  # keeps the result of exp; hidden is freed below
            del hidden
            loss.backward()
        made = 20 * 50 + 20 * 30 + 2  # x, exp, the loss and the 1 that its gradient starts from
        assert meter.backward_began_bytes == 4 * (made + 30 * 50)  # the weight is seen through its transpose

    def test_numbers_are_read_off_tensors_without_content(self) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True), StepMeter():
            x = torch.empty(3)
            assert (x.sum().item(), x.double().tolist()) == (1.0, [1.0, 1.0, 1.0])


def saved_bytes(spec: RunSpec, config: LlamaConfig, rows: int, tokens: int) -> int:
    """What autograd says it saves in a real forward pass, each storage once, parameters left out."""
    learner = build_learner(spec, step_meter._inputs_without_data(spec, config), ignore_event, never_stop)
    return saved_by_autograd(learner, even_batch(rows, tokens, 0.46))


@pytest.mark.parametrize("targets", [QV, LINEAR_MODULES])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_says_it_saves(
    targets: tuple[str, ...], dtype: str, precision: str, dropout: float
) -> None:
    spec = spec_of(targets, dropout=dropout, dtype=dtype, precision=precision)
    measured = measure_step(spec, TINY, 2, 128)
    found = measured.after_forward_bytes - measured.resident_bytes
    expected = saved_bytes(spec, TINY, 2, 128)
    # Alive but not saved: the angles that all blocks share, token ids, positions, labels, and the head's gradient.
    angles = 2 * 256 * TINY.head_dim * 4
    gradient = 2 * 59 * TINY.hidden_size * (4 if dtype == "float32" else 2)
    assert expected <= found <= expected + angles + gradient + 2 * 128 * 5 * 8
    deeper = LlamaConfig(**{**vars(TINY), "num_hidden_layers": 4})
    per_layer = (saved_bytes(spec, deeper, 2, 128) - expected) / 256
    assert measured.saved_bytes_per_token_layer == pytest.approx(per_layer, rel=1e-3)


@pytest.mark.parametrize("mode", ["none", "block", "every_2", "attention", "feed_forward", "sublayer", "projections"])
def test_without_content_is_as_with_content(mode: str) -> None:
    config = LlamaConfig(**{**vars(TINY), "num_hidden_layers": 4, "num_key_value_heads": 2})
    spec = spec_of(QV, mode, dropout=0.1, gradient_accumulation_steps=2)
    batch = even_batch(2, 32, 0.46)
    fake = step_meter._run(spec, config, batch)
    resident, meter = real_step(spec, config, batch)
    assert resident == pytest.approx(fake.resident_bytes, rel=1e-3)
    assert meter.peak_bytes == pytest.approx(fake.peak_bytes, rel=1e-3)
    assert meter.backward_began_bytes == pytest.approx(fake.after_forward_bytes, rel=1e-3)


def test_weights_and_states_are_the_closed_form() -> None:
    config = PRESETS["tinyllama-1.1b"].with_layers(2)
    measured = measure_step(spec_of(LINEAR_MODULES), config, 1, 16)
    count = count_parameters(config, AdapterSpec(16, 32, target_modules=LINEAR_MODULES))
    assert measured.weights_bytes == 2 * count.base_parameters
    fp32 = 4 * count.trainable_parameters
    counters = 4 * 2 * len(LINEAR_MODULES) * 2  # AdamW's, one a tensor
    batch = 2 * 8 * 16  # ids and labels
    assert measured.resident_bytes == measured.weights_bytes + 3 * fp32 + counters + batch  # weight, two moments
    assert measured.peak_bytes >= measured.after_forward_bytes > measured.resident_bytes


def test_recomputing_saves_a_blocks_input_alone() -> None:
    saved = {mode: measure_step(spec_of(QV, mode), TINY, 2, 64).saved_bytes_per_token_layer for mode in
             ("none", "block", "every_2", "sublayer")}  # fmt: skip
    assert saved["block"] == 2 * TINY.hidden_size
    assert saved["sublayer"] == 2 * 2 * TINY.hidden_size
    assert saved["every_2"] == pytest.approx((saved["none"] + saved["block"]) / 2, rel=0.05)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_nothing_has_the_square_of_the_length(kv_heads: int) -> None:
    config = LlamaConfig(64, 160, 2, 4, kv_heads, 96)
    measured = measure_step(spec_of(QV), config, 1, 8192)
    assert measured.largest_tensor_bytes < 8192 * 8192 // 8


@pytest.mark.parametrize(
    "setting",
    [setting if setting in QUICK else slow(setting) for setting in AT_MOST],
    ids=lambda it: f"{len(it[0])} targets, {it[1]}x{it[2]}, {it[3]}, {it[4]}",
)
def test_llama_2_7b_stays_within_its_bounds(setting: tuple[tuple[str, ...], int, int, str, str]) -> None:
    targets, rows, tokens, mode, dtype = setting
    measured = measure_step(spec_of(targets, mode, dtype=dtype), PRESETS["llama-2-7b"], rows, tokens)
    peak_gib, saved_kib = AT_MOST[setting]
    assert measured.peak_bytes / GIB <= peak_gib
    assert measured.saved_bytes_per_token_layer / KIB <= saved_kib


def test_the_peak_grows_evenly_with_depth() -> None:
    spec = spec_of(LINEAR_MODULES)
    two, four, eight = (
        measure_step(spec, PRESETS["llama-2-7b"].with_layers(depth), 1, 512).peak_bytes for depth in (2, 4, 8)
    )
    assert eight == pytest.approx(four + 2 * (four - two), rel=0.01)
