"""The members of the family against transformers: kinds of rope, sliding windows, and two training steps of PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_judges import adapted
from torch import Tensor

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters
from llamatune.model.loss import summed_loss
from llamatune.model.transformer import Transformer

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
SHAPES = {
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
}  # fmt: skip
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
IDS = torch.randint(0, 131, (2, 53), generator=torch.Generator().manual_seed(6))


def judge(base: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval()


@every_shape
def test_logits_are_those_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    """Beyond the window, and beyond the context of the pretraining; in batches and alone."""
    base = tiny_base(**changes)
    ours, theirs = load_model(base), judge(base)
    with torch.no_grad():
        for ids in (IDS, IDS[:1], IDS[:, :11]):
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
            half = ours.bfloat16()(ids).float() if ids is IDS[:1] else None
            assert half is None or (half - theirs(ids).logits).norm() / theirs(ids).logits.norm() < 0.03


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


def peft_steps(base: Path, adapter: Path, batches: list[Tensor], rate: float) -> dict[str, Tensor]:
    """The adapter after a step of SGD on each batch, whose samples are computed one at a time."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(judge(base), adapter, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate)
    for batch in batches:
        optimizer.zero_grad()
        for ids in batch:
            model(ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {n.removeprefix("base_model.model.").replace(".default", ""): p.detach() for n, p in named.items()}


def our_steps(model: Transformer, batches: list[Any], rate: float) -> dict[str, Tensor]:
    model.requires_grad_(False)
    parameters = dict(adapter_parameters(model))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters.values(), rate)
    for batch in batches:
        optimizer.zero_grad()
        lengths = tuple(map(len, batch))
        row, weights = torch.cat(list(batch))[None], [1 / (n - 1) for n in lengths]
        assert len(set(weights)) == 1, "each sample's mean loss counts the same"
        (summed_loss(model, row, row, lengths) * weights[0]).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@every_shape
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_two_training_steps_are_those_of_peft(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], changes: dict[str, Any], fused: bool
) -> None:
    """On rows that hold several samples, which transformers computes alone."""
    base = tiny_base(**changes)
    adapter = peft_adapter(base)
    batches = [IDS, IDS.flip(1)[:, :29]]
    expected = peft_steps(base, adapter, batches, 0.05)
    model = adapted(base, adapter).train()
    apply_activation_checkpointing(model, "full" if fused else "none", fused)
    found = our_steps(model, batches, 0.05)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [SHAPES["dynamic"], SHAPES["window"]], ids=["dynamic", "window"])
def test_a_sample_of_a_row_is_computed_as_it_is_alone(tiny_base: Callable[..., Path], changes: dict[str, Any]) -> None:
    model = load_model(tiny_base(**changes))
    lengths = (3, 40, 5, 5, 36)
    row = torch.randint(0, 131, (1, sum(lengths)))
    with torch.no_grad():
        alone = torch.cat([model(part) for part in torch.split(row, lengths, dim=1)], dim=1)
        torch.testing.assert_close(model(row, lengths=lengths), alone, atol=1e-5, rtol=0)
