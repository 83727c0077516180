"""Advice for want of memory: no change that the spec has already, whatever it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llamatune.inference.evaluate import smaller_batches
from llamatune.inference.model_source import OpenedModel
from llamatune.memory.plan import plan_memory
from llamatune.memory.remedies import after_running_out, remedies
from llamatune.memory.sizes import Rows
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec, build_spec
from llamatune.strict_yaml import parse_yaml

SHAPE = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=500, max_position_embeddings=512,
)  # fmt: skip
FRUGAL = [
    "training.micro_batch_size=1", "training.optimizer=sgd", "training.activation_checkpointing=block", "lora.r=1",
    "model.dtype=nf4", "training.tokens_per_pass=null", "training.precision=bf16", "model.placement=host",
]  # fmt: skip


def _spec(*overrides: str, lora: bool = True) -> RunSpec:
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o", "precision": "fp32"}}
    return build_spec({**values, **({"lora": {}} if lora else {})}, "test", overrides)


def _already(spec: RunSpec, change: str) -> list[str]:
    """The assignments of a remedy that change nothing."""
    flat = spec.flat()
    pairs = (word.rstrip(":;").partition("=") for word in change.split() if "=" in word)
    return [key for key, _, text in pairs if flat.get(key, flat) == parse_yaml(text, "test")]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        FRUGAL,
        *(FRUGAL[:place] + FRUGAL[place + 1 :] for place in range(len(FRUGAL))),
        ["training.optimizer=adamw_8bit", "model.dtype=float8"],
        ["model.dtype=float32", "training.fused=false", "training.micro_batch_size=8"],
        ["model.dtype=float32", "training.precision=fp16", "lora.modules_to_save=[embed_tokens]"],
        ["data.packing=true", "training.activation_checkpointing=every_2", "training.memory_limit=1GiB"],
        ["lora=null", "model.dtype=float32", "training.precision=fp16"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("cuda", "ranks"), [(False, 1), ((7, 5), 2)])
def test_no_remedy_names_what_the_spec_has(overrides: list[str], cuda: Gpu, ranks: int) -> None:
    spec = _spec(*overrides)
    plan = plan_memory(spec, SHAPE, Rows((60, 50, 40), 100, ranks=ranks), cuda, 1 << 20)
    for remedy in remedies(spec, SHAPE, plan, cuda):
        assert not _already(spec, remedy.change), remedy.change
    assert not _already(spec, after_running_out(spec, SHAPE, plan, cuda))


@pytest.mark.parametrize(
    ("held", "batch_size", "advice"),
    [
        ("float32", 16, "lower --batch-size, or use a 16-bit --dtype"),
        ("bfloat16", 16, "lower --batch-size, or use --dtype float8 or nf4"),
        ("float16", 1, "use --dtype float8 or nf4"),
        ("float8", 1, "use --dtype nf4"),
        ("int8", 1, "use --dtype nf4"),
        ("nf4", 1, ""),
    ],
)
def test_no_option_is_advised_that_was_given(held: str, batch_size: int, advice: str) -> None:
    opened: Any = SimpleNamespace(dtype_name=held)
    assert OpenedModel.memory_advice(opened, *smaller_batches(batch_size)) == advice


def test_the_check_above_finds_what_is_there_already() -> None:
    assert _already(_spec("training.optimizer=sgd"), "try training.optimizer=sgd (keeps no state): about 1 MiB")
    assert not _already(_spec(), "training.optimizer=sgd")
