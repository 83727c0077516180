"""Members of the family against transformers: kinds of rope, windows, biases, norms of heads; two steps of PEFT's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_judges import adapted
from torch import Tensor

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters
from llamatune.model.loss import summed_loss
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.quantization import QUANTIZATIONS

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA_3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn, untruncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9,
                          "beta_fast": 3.5, "beta_slow": 0.5, "truncate": False},
    "yarn, mscale": {"rope_type": "yarn", "factor": 7.0, "original_max_position_embeddings": 8, "mscale": 1.3,
                     "mscale_all_dim": 0.6},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16,
                               "attention_factor": 0.83},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama 2": {},
    **{name: {"rope_parameters": {"rope_theta": 5e3, **rope}, "max_position_embeddings": 32}
       for name, rope in ROPES.items()},
    "wide heads, tied": {"rope_parameters": {"rope_theta": 5e5, **ROPES["llama3"]}, "head_dim": 14,
                         "tie_word_embeddings": True},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "window of two": {"model_type": "mistral", "sliding_window": 2, "head_dim": 10},
    "long window": {"model_type": "mistral", "sliding_window": 41},
    "no window": {"model_type": "mistral", "sliding_window": None},
    "window and yarn": {"model_type": "mistral", "sliding_window": 7, "max_position_embeddings": 32,
                        "rope_parameters": {"rope_theta": 1e4, **ROPES["yarn"]}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of attention, tied": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 10},
    "qwen 2": {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen 2, tied, window": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True,
                             "sliding_window": 6, "max_window_layers": 0},
    "qwen 3": {"model_type": "qwen3", "head_dim": 14, "rms_norm_eps": 1e-6},
    "qwen 3, tied, biases, yarn": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True,
                                   "tie_word_embeddings": True, "max_position_embeddings": 32,
                                   "rope_parameters": {"rope_theta": 1e4, **ROPES["yarn"]}},
}  # fmt: skip
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
IDS = torch.randint(0, 131, (2, 53), generator=torch.Generator().manual_seed(6))


def judge(base: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval()


def mostly_slow(*always: str) -> Any:
    """Every shape, those not named in the long sweep alone."""
    cases = [(changes, () if name in always else pytest.mark.slow, name) for name, changes in SHAPES.items()]
    return pytest.mark.parametrize("changes", [pytest.param(case, marks=marks, id=name) for case, marks, name in cases])


@every_shape
def test_logits_are_those_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    compare_logits(tiny_base, changes, torch.float32)


@mostly_slow("qwen 3, tied, biases, yarn")
def test_logits_of_16_bits_are_those_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    compare_logits(tiny_base, changes, torch.bfloat16)


def compare_logits(tiny_base: Callable[..., Path], changes: dict[str, Any], stored: torch.dtype) -> None:
    """Beyond the window, and beyond the context of the pretraining; in batches and alone."""
    base = tiny_base(dtype=stored, **changes)
    ours, theirs = load_model(base, torch.float32), judge(base)
    with torch.no_grad():
        for ids in (IDS, IDS[:1], IDS[:, :11]):
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        exact, halves = theirs(IDS).logits, (ours.bfloat16()(IDS), theirs.bfloat16()(IDS).logits)
        found, expected = (float((half.float() - exact).norm() / exact.norm()) for half in halves)
    assert found < 1.2 * expected + 0.002


@every_shape
def test_greedy_decoding_is_that_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    """From prompts before the limits to completions beyond them; alone, and padded on the left in a batch."""
    base = tiny_base(**changes)
    ours, theirs = load_model(base), judge(base)
    prompts = [[1, 5, 30, 9], [1, *range(40, 70)], [1, 3, 3, 70, 11, 25, 90, 6]]
    expected = []
    for prompt in prompts:
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        expected.append(ids[0, len(prompt) :].tolist())
    sampling = Sampling(max_new_tokens=24, temperature=0)
    assert [made.ids for made in complete(ours, prompts, sampling, ())] == expected
    assert [complete(ours, [prompt], sampling, ())[0].ids for prompt in prompts] == expected


BATCHES = [IDS, IDS.flip(1)[:, :29]]
Trained = tuple[list[float], dict[str, Tensor]]


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An epsilon that is no less than the gradients' rounding, which it would make a step of."""
    return torch.optim.AdamW(parameters, 0.01, eps=1e-5)


@functools.cache
def peft_steps(base: Path, adapter: Path, dtype: torch.dtype) -> Trained:
    """Loss of each batch and the adapter after a step on each, whose samples are computed one at a time."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(judge(base).to(dtype), adapter, is_trainable=True)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, losses = adamw(named.values()), []
    for batch in BATCHES:
        optimizer.zero_grad()
        parts = [model(ids[None], labels=ids[None]).loss / len(batch) for ids in batch]
        torch.stack(parts).sum().backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    return losses, {n.removeprefix("base_model.model.").replace(".default", ""): p.detach() for n, p in named.items()}


def our_steps(base: Path, adapter: Path, dtype: torch.dtype, fused: bool, quantized: str | None = None) -> Trained:
    model = adapted(base, adapter, dtype).train()
    if quantized is not None:
        quantize_blocks(model, QUANTIZATIONS[quantized], dtype)
    apply_activation_checkpointing(model, "full" if fused else "none", fused)
    parameters = dict(adapter_parameters(model))
    optimizer, losses = adamw(parameters.values()), []
    for batch in BATCHES:
        optimizer.zero_grad()
        row, lengths = batch.reshape(1, -1), tuple(map(len, batch))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = summed_loss(model, row, row, lengths) / sum(length - 1 for length in lengths)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@every_shape
@FUSED
def test_two_training_steps_are_those_of_peft(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], changes: dict[str, Any], fused: bool
) -> None:
    """On rows that hold several samples, which transformers computes alone."""
    base = tiny_base(**changes)
    adapter = peft_adapter(base, r=4)
    losses, expected = peft_steps(base, adapter, torch.float32)
    found_losses, found = our_steps(base, adapter, torch.float32, fused)
    assert found_losses == pytest.approx(losses, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def moved(trained: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(trained[name] - tensor).flatten() for name, tensor in start.items()])


@mostly_slow("qwen 3, tied, biases, yarn")
@FUSED
def test_in_bf16_two_training_steps_are_as_near_to_the_truth_as_pefts(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], changes: dict[str, Any], fused: bool
) -> None:
    base = tiny_base(dtype=torch.bfloat16, **changes)
    adapter = peft_adapter(base, r=4)
    start = load_adapter(adapter).tensors
    losses, expected = peft_steps(base, adapter, torch.float32)
    _, theirs = peft_steps(base, adapter, torch.bfloat16)
    found_losses, found = our_steps(base, adapter, torch.bfloat16, fused)
    assert found_losses == pytest.approx(losses, rel=0.01)
    exact = moved(expected, start)
    errors = [float((moved(trained, start) - exact).norm() / exact.norm()) for trained in (found, theirs)]
    assert errors[0] < 1.2 * errors[1]


SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
IN_METAS_FORMAT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama 2": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "llama 3.1": ({"rope_parameters": SCALED}, {"rope_theta": 5e5, "use_scaled_rope": True}),
    "mistral": ({"model_type": "mistral", "sliding_window": 5, "head_dim": 10},
                {"sliding_window": 5, "head_dim": 10, "hidden_dim": 100}),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "params"), IN_METAS_FORMAT.values(), ids=IN_METAS_FORMAT.keys())
@pytest.mark.parametrize("stored", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_from_metas_format(
    tiny_base: Callable[..., Path],
    meta_copy: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    changes: dict[str, Any],
    params: dict[str, Any],
    stored: torch.dtype,
) -> None:
    base = tiny_base(dtype=stored, **changes)
    meta = meta_copy(base, **params)
    with torch.no_grad():
        torch.testing.assert_close(load_model(meta, torch.float32)(IDS), judge(base)(IDS).logits, atol=1e-4, rtol=0)
    adapter = peft_adapter(base, r=4)
    losses, expected = peft_steps(base, adapter, torch.float32)
    found_losses, found = our_steps(meta, adapter, torch.float32, fused=True)
    assert found_losses == pytest.approx(losses, abs=1e-5)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-3)


ADDITIONS = pytest.mark.parametrize(
    "changes",
    [SHAPES[name] for name in ("biases", "qwen 2", "qwen 3, tied, biases, yarn")],
    ids=["biases", "qwen 2", "qwen 3"],
)


@ADDITIONS
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_two_steps_on_a_quantised_base(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], changes: dict[str, Any], kind: str
) -> None:
    base = tiny_base(**changes)
    adapter = peft_adapter(base, r=4)
    plain, fused = (our_steps(base, adapter, torch.float32, fused, kind) for fused in (False, True))
    exact, _ = peft_steps(base, adapter, torch.float32)
    assert plain[0] != pytest.approx(exact, rel=1e-4), "nothing was quantised"
    assert plain[0] == pytest.approx(exact, rel=0.05)
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(fused[1][name], tensor, atol=2e-5, rtol=1e-3)


@ADDITIONS
def test_beam_search_is_that_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    base = tiny_base(**changes)
    ours, theirs = load_model(base), judge(base)
    for prompt in ([1, 5, 30, 9], [1, *range(40, 50)]):
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None
        )
        found = complete(ours, [prompt], Sampling(max_new_tokens=12, num_beams=3), ())[0]
        assert found.ids == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [SHAPES["dynamic"], SHAPES["window"]], ids=["dynamic", "window"])
def test_a_sample_of_a_row_is_computed_as_it_is_alone(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    model = load_model(tiny_base(**changes))
    lengths = (3, 40, 5, 5, 36)
    row = torch.randint(0, 131, (1, sum(lengths)))
    with torch.no_grad():
        alone = torch.cat([model(part) for part in torch.split(row, lengths, dim=1)], dim=1)
        torch.testing.assert_close(model(row, lengths=lengths), alone, atol=1e-5, rtol=0)
