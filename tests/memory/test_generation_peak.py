"""The peak of ``plan-memory --generate`` against every tensor that an engine makes, by shape, work and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llamatune.benchmarking.category_meter import StorageMeter
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import completions
from llamatune.memory import generation_pass
from llamatune.memory.generation import HeldModel, Work, plan_generation
from llamatune.model import attention_of_one_query
from llamatune.model.joined_products import join_products
from llamatune.model.transformer import Block, Transformer
from llamatune.shapes import attention_kernels
from llamatune.shapes.llama_config import LlamaConfig

SHAPE = LlamaConfig(96, 256, 4, 6, 6, 500, max_position_embeddings=4096)
SHAPES = {
    "llama": SHAPE,
    "grouped": replace(SHAPE, num_key_value_heads=2),
    "one layer": replace(SHAPE, num_hidden_layers=1),
    "mostly attention": replace(SHAPE, intermediate_size=32),
    "mostly attention and grouped": replace(SHAPE, intermediate_size=32, num_key_value_heads=2),
    "large vocabulary": replace(SHAPE, vocab_size=20000, tie_word_embeddings=True),
    "odd vocabulary": replace(SHAPE, vocab_size=20001, tie_word_embeddings=True),
    "many heads": LlamaConfig(96, 32, 1, 48, 48, 40, max_position_embeddings=4096),
    "many heads and grouped": LlamaConfig(96, 32, 1, 48, 12, 40, max_position_embeddings=4096),
    "wide": replace(SHAPE, intermediate_size=1024),
    "window": replace(SHAPE, sliding_window=150),
    "head norms": replace(SHAPE, head_norms=True, intermediate_size=32),
    "biases": replace(SHAPE, biased_modules=("q_proj", "k_proj", "v_proj")),
}
WORKS = {
    "one": (1, Work(100, 4, 1, 1)),
    "a full batch": (16, Work(120, 3, 16, 16)),
    "that grows": (3, Work(250, 10, 3, 3)),
    "more than rows": (4, Work(130, 5, 2)),
    "greedy": (4, Work(40, 8, 4, 4, draws=False)),
    "in parts": (1, Work(2500, 2, 1, 1)),
    "beams": (1, Work(150, 6, beams=4)),
    "long answers": (16, Work(2, 200, 16, 16)),
}


@pytest.mark.parametrize(
    ("shape", "asked", "dtype"),
    [
        ("llama", "one", "float32"),
        ("llama", "in parts", "float32"),
        ("llama", "beams", "float32"),
        ("grouped", "that grows", "float32"),
        ("one layer", "that grows", "float32"),
        ("mostly attention", "more than rows", "float32"),
        ("large vocabulary", "greedy", "float32"),
        ("large vocabulary", "greedy", "bfloat16"),
        ("odd vocabulary", "greedy", "bfloat16"),
        ("wide", "one", "float32"),
        ("wide", "in parts", "bfloat16"),
        ("wide", "a full batch", "bfloat16"),
        ("wide", "greedy", "bfloat16"),
        ("large vocabulary", "a full batch", "float32"),
        ("large vocabulary", "a full batch", "bfloat16"),
        ("large vocabulary", "beams", "bfloat16"),
        ("window", "in parts", "bfloat16"),
        ("mostly attention", "in parts", "float32"),
        ("mostly attention and grouped", "in parts", "float32"),
        ("mostly attention and grouped", "in parts", "bfloat16"),
        ("head norms", "one", "float32"),
        ("biases", "more than rows", "float32"),
    ],
)
def test_the_peak_is_that_of_the_tensors(shape: str, asked: str, dtype: str, amx: bool) -> None:
    """All tensors that operations make, but not those inside an operator: in bf16 short samples are widened in one."""
    check_peak(shape, asked, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "least"),
    [
        ("many heads", "float32", 1),
        ("many heads", "float32", 1 << 30),
        ("many heads and grouped", "float32", 1),
        ("many heads", "bfloat16", 1),
        ("many heads", "float16", 1),
        ("many heads and grouped", "float16", 1 << 15),
    ],
)
def test_the_peak_is_that_of_steps_that_compute_attention_in_any_way(
    shape: str, dtype: str, least: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, by products, of queries that stand twice, and in fp32; the steps take more than the prompts."""
    monkeypatch.setattr(attention_kernels, "LEAST_BY_PRODUCTS", least)
    for module in (attention_of_one_query, generation_pass):
        monkeypatch.setattr(module, "WIDENED_AT_ONCE", least)
    check_peak(shape, "long answers", dtype)


def check_peak(shape: str, asked: str, dtype: str) -> None:
    """Of the tensors, against the plan."""
    config, (prompts, work) = SHAPES[shape], WORKS[asked]
    torch.manual_seed(1)
    model = Transformer(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.05)
    model = model.to(getattr(torch, dtype))
    for block in model.model.layers:
        assert isinstance(block, Block)
        join_products(block, model.config)  # as generation on a CPU does
    meter = StorageMeter()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        meter._follow(parameter.untyped_storage())
    weights = meter.peak_bytes
    sampling = Sampling(work.new_tokens, temperature=0.6 * work.draws, num_beams=work.beams)
    with meter:
        list(completions(model, [[1] * work.prompt_tokens] * prompts, sampling, (), work.rows))
    planned = plan_generation(HeldModel(config, dtype, dtype, dtype), work).memory
    assert planned.weights == weights
    assert planned.peak - weights == pytest.approx(meter.peak_bytes - weights, rel=0.04)
