"""The rotation's settings have several homes in a configuration: all are read, and all are written."""

from __future__ import annotations

import json
import re

import pytest

from llamatune.checkpoints.config_json import write_config_json
from llamatune.checkpoints.model_directory import read_config
from llamatune.errors import CheckpointError
from llamatune.shapes.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4, "original_max_position_embeddings": 16}
SIZES = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def config_of(path, **facts):
    (path / "config.json").write_text(json.dumps(SIZES | facts))
    return read_config(path)


def written(path, config):
    (path / "out").mkdir()
    write_config_json(path / "out", config, "bfloat16")
    assert read_config(path / "out") == config
    return path / "out"


@pytest.mark.parametrize("kind", ["type", "rope_type", "both"])
@pytest.mark.parametrize("home", ["rope_scaling", "rope_parameters", "both"])
@pytest.mark.parametrize("theta", ["apart", "inside", "both"])
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("linear", {"factor": 2}, LinearScaling(2.0)),
        ("linear", {"factor": 1.0}, LinearScaling(1.0)),
        ("dynamic", {"factor": 2.5}, DynamicScaling(2.5, 64)),
        ("llama3", LLAMA_3, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        ("yarn", {**YARN, "mscale": 1, "truncate": False}, YarnScaling(4.0, 16, mscale=1.0, truncate=False)),
        ("yarn", {"factor": 4}, YarnScaling(4.0, 64)),
    ],
)
def test_every_spelling_is_read(tmp_path, name, values, expected, kind, home, theta):
    rope = dict(values)
    rope |= dict.fromkeys({"both": ("type", "rope_type")}.get(kind, (kind,)), name)
    if theta != "apart":
        rope["rope_theta"] = 500000
    facts = dict.fromkeys({"both": ("rope_scaling", "rope_parameters")}.get(home, (home,)), rope)
    if theta != "inside":
        facts["rope_theta"] = 5e5
    config = config_of(tmp_path, **facts)
    assert (config.rope_scaling, config.rope_theta) == (expected, 5e5)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "llama3", **LLAMA_3}},
         ["rope_parameters.rope_type is llama3", "rope_scaling.type is linear"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
         ["rope_parameters.rope_type is default", "rope_scaling.type is linear"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
         ["rope_scaling.rope_type is dynamic", "rope_scaling.type is linear"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
         ["rope_parameters.factor is 3.0", "rope_scaling.factor is 2.0"]),
        ({"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 32},
         ["original_max_position_embeddings is 32.0", "rope_scaling.original_max_position_embeddings is 16.0"]),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN, "rope_theta": 5e5}},
         ["rope_theta is 10000.0", "rope_scaling.rope_theta is 500000.0"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ["rope_parameters.rope_type is 'longrope'",
         "known: default, linear, dynamic, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, ["rope_parameters.rope_type is ['yarn']"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["'llama3' has no low_freq_factor"]),
        ({"rope_scaling": {"type": "llama3", **LLAMA_3, "low_freq_factor": 4}}, ["low_freq_factor 4.0 is not less"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor of the rope type 'linear' is 0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": True}}, ["factor is true", "a number is expected"]),
        ({"rope_scaling": {"type": "yarn", **YARN, "original_max_position_embeddings": 1.5}}, ["is 1.5: "]),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1}, ["rope_theta 1 is impossible"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, ["head_dim 2 is too small"]),
        ({"rope_scaling": [1]}, ["rope_scaling is [1]"]),
        ({"rope_scaling": {"factor": 2.0, "type": None}}, ["rope_scaling has factor 2.0 and no rope_type"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["other angles in some layers"]),
        ({"rope_scaling": {"type": "yarn", **YARN, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
    ],
)  # fmt: skip
def test_what_differs_or_is_not_known_is_named(tmp_path, facts, words):
    with pytest.raises(CheckpointError) as caught:
        config_of(tmp_path, **facts)
    for word in [*words, "config.json"]:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn", None])
def test_what_is_written_is_read_by_every_reader(tmp_path, name):
    values = {"llama3": LLAMA_3, "yarn": {**YARN, "attention_factor": 0.9}, None: {}}.get(name, {"factor": 2.0})
    rope = {"rope_scaling": {"type": name, **values}} if name else {}
    config = config_of(tmp_path, rope_theta=7e4, **rope)
    path = written(tmp_path, config)
    facts = json.loads((path / "config.json").read_text())
    assert facts["rope_theta"] == facts["rope_parameters"]["rope_theta"] == 7e4
    assert facts["rope_parameters"]["rope_type"] == (name or "default")
    if name is None:
        assert facts["rope_scaling"] is None
    else:
        assert facts["rope_scaling"]["type"] == facts["rope_scaling"]["rope_type"] == name
        assert facts["rope_scaling"].items() >= values.items()
        assert facts["rope_parameters"].items() >= values.items()
    from transformers import LlamaConfig

    theirs = LlamaConfig.from_pretrained(path).rope_parameters
    assert theirs["rope_theta"] == 7e4
    assert theirs["rope_type"] == (name or "default")
    assert theirs.items() >= values.items()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gemma2", "norms behind each half"), ("phi3", "q, k, v and gate, up as one matrix"),
        ("mixtral", "several experts"), ("olmo3", "norms behind each half"),
        ("a" * 200, "what it computes is not known here; supported are llama, mistral, qwen2, qwen3"),
    ],
)  # fmt: skip
def test_other_models_are_refused_with_what_differs(tmp_path, kind, words):
    with pytest.raises(CheckpointError, match=re.escape(f"model_type is '{kind}'") + f".*{words}"):
        config_of(tmp_path, model_type=kind)


def test_a_long_value_is_shown_whole(tmp_path):
    layout = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", **{f"setting_{i}": i for i in range(20)}}
    with pytest.raises(CheckpointError) as caught:
        config_of(tmp_path, quantization_config=layout)
    assert '"setting_19": 19}' in str(caught.value)
    assert str(caught.value).endswith("give the model that it was made from")


@pytest.mark.parametrize(
    ("facts", "window", "heads", "positions"),
    [
        ({"sliding_window": 4096, "num_key_value_heads": None}, 4096, 4, 64),
        ({"sliding_window": None}, None, 2, 64),
        ({}, 4096, 2, 64),
    ],
)
def test_mistral_says_less_than_it_means(tmp_path, facts, window, heads, positions):
    """A key that is missing has another meaning than one that is null."""
    from transformers import MistralConfig

    config = config_of(tmp_path, **{**facts, "model_type": "mistral"})
    assert (config.sliding_window, config.num_key_value_heads, config.max_position_embeddings) == (
        window, heads, positions,
    )  # fmt: skip
    theirs = MistralConfig.from_pretrained(written(tmp_path, config))
    assert (theirs.sliding_window, theirs.num_key_value_heads, theirs.model_type) == (window, heads, "mistral")


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("facts", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 9}, None),  # from the 28th layer on
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"layer_types": [FULL, FULL]}, None),
        ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": [FULL, FULL]}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": [SLIDING, SLIDING]}, 9),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "max_window_layers is 1"),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, SLIDING]}, "layer_types is"),
        ({"layer_types": [SLIDING, SLIDING]}, "layer_types is"),
        ({"layer_types": ["chunked_attention", FULL]}, "layer_types is"),
        ({"layer_types": FULL}, "layer_types is"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwens_windows_are_those_of_transformers(tmp_path, kind, facts, window):
    """Off unless a flag is true, and then in the layers that are listed, or from one on."""
    from transformers import AutoConfig

    if isinstance(window, str):
        with pytest.raises(CheckpointError, match=window):
            config_of(tmp_path, **facts, model_type=kind)
        return
    config = config_of(tmp_path, **facts, model_type=kind)
    assert config.sliding_window == window
    for path in (tmp_path, written(tmp_path, config)):
        theirs = AutoConfig.from_pretrained(path)
        slides = [SLIDING if window else FULL] * config.num_hidden_layers
        assert (theirs.layer_types, theirs.sliding_window if window else None) == (slides, window)
