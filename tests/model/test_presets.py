"""The published sizes of the family: counts to the last parameter, and what transformers builds of the same numbers."""

from __future__ import annotations

import pytest
import torch

from llamatune.checkpoints.config_json import write_config_json
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.presets import PRESETS

PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "code-llama-7b": 6_738_546_688, "code-llama-13b": 13_016_028_160, "code-llama-34b": 33_743_970_304,
    "tinyllama-1.1b": 1_100_048_384, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
}  # fmt: skip


def test_every_preset_has_its_published_count() -> None:
    assert {name: count_parameters(config).base_parameters for name, config in PRESETS.items()} == PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_builds_the_same_tensors(tmp_path, name) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = PRESETS[name].with_layers(2)
    write_config_json(tmp_path, config, "bfloat16")
    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == dict(config.parameter_shapes())
    assert theirs.max_position_embeddings == config.max_position_embeddings
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert getattr(theirs, "sliding_window", None) == config.sliding_window
