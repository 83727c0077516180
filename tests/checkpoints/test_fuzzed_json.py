"""Every JSON that a model or adapter brings along, with any value replaced: an error of ours, or a usable model.

Whatever is accepted is then really read, so that a bad value cannot lie in wait behind the check.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamatune.checkpoints.adapter import check_adapter, load_adapter
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.errors import LlamatuneError
from llamatune.events import ignore_event

from .conftest import save_tiny

HOSTILE = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**63,
            10**30,
            0.5,
            -0.0,
            1e308,
            "",
            "F32",
            "BF16",
            "../../etc/passwd",
            "/dev/zero",
        ]
    ),
    st.sampled_from(["q_proj", ".*", "(a+)+$", "model.safetensors", "a/b.safetensors", "\x00", "\u2028", [], {}, [[]]]),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.text(max_size=8),
)
ANY = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def places(value, path=()):
    """The path of every node below ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, node in inner:
        yield (*path, key)
        yield from places(node, (*path, key))


@st.composite
def damaged(draw, value):
    """``value`` with up to three of its nodes replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        node = value
        for step in above:
            node = node[step]
        change = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if change == "replace":
            node[key] = copy.deepcopy(draw(HOSTILE))  # what is drawn is shared, and the next change may be in it
        elif change == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=6))] = node.pop(key) if change == "rename" else copy.deepcopy(draw(HOSTILE))
    return value


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Small enough to be copied for every example, and in several shards."""
    path = tmp_path_factory.mktemp("fuzzed") / "model"
    save_tiny(path, shard="20KB", vocab_size=32, num_hidden_layers=1)
    return path


def read_whole(path: Path) -> None:
    """Open, sample and load; only the documented errors may come out."""
    try:
        checkpoint = open_checkpoint(path)
        fingerprint(checkpoint)
        loaded = load_model(checkpoint, torch.float32, torch.device("cpu"), on_event=ignore_event)
    except LlamatuneError as fault:
        assert fault.exit_code in (4, 5)
        assert "\n" not in str(fault)
    else:
        with torch.no_grad():
            loaded(torch.tensor([[1, 2, 3]]))


def rewrite(source: Path, scratch: Path, name: str, content: bytes) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    (scratch / name).write_bytes(content)
    return scratch


@ANY
@given(data=st.data())
def test_any_configuration_is_refused_or_works(model, tmp_path, data):
    value = data.draw(damaged(json.loads((model / "config.json").read_text())))
    read_whole(rewrite(model, tmp_path / "copy", "config.json", json.dumps(value).encode()))


@ANY
@given(data=st.data())
def test_any_index_is_refused_or_works(model, tmp_path, data):
    name = "model.safetensors.index.json"
    value = data.draw(damaged(json.loads((model / name).read_text())))
    read_whole(rewrite(model, tmp_path / "copy", name, json.dumps(value).encode()))


def split(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@ANY
@given(data=st.data(), excess=st.sampled_from([0, 0, 0, -1, 1, 1 << 40, (1 << 64) - 9]))
def test_any_header_of_tensors_is_refused_or_works(model, tmp_path, data, excess):
    shard = sorted(model.glob("*.safetensors"))[0]
    header, tensors = split(shard)
    text = json.dumps(data.draw(damaged(header))).encode()
    content = struct.pack("<Q", (len(text) + excess) % (1 << 64)) + text + tensors
    read_whole(rewrite(model, tmp_path / "copy", shard.name, content))


@ANY
@given(data=st.data())
def test_any_meta_parameters_are_refused_or_work(tiny_meta, tmp_path, data):
    value = data.draw(damaged(json.loads((tiny_meta / "params.json").read_text())))
    read_whole(rewrite(tiny_meta, tmp_path / "copy", "params.json", json.dumps(value).encode()))


def read_adapter(path: Path, base: Path) -> None:
    try:
        checkpoint = open_checkpoint(base)
        check_adapter(load_adapter(path), checkpoint.config, fingerprint(checkpoint), False, ignore_event)
    except LlamatuneError as fault:
        assert fault.exit_code in (4, 5)
        assert "\n" not in str(fault)


@ANY
@given(data=st.data())
def test_any_adapter_configuration_is_refused_or_works(tiny, tiny_adapter, tmp_path, data):
    value = data.draw(damaged(json.loads((tiny_adapter / "adapter_config.json").read_text())))
    copied = rewrite(tiny_adapter, tmp_path / "copy", "adapter_config.json", json.dumps(value).encode())
    read_adapter(copied, tiny[0])


@ANY
@given(data=st.data())
def test_any_header_of_an_adapter_is_refused_or_works(tiny, tiny_adapter, tmp_path, data):
    header, tensors = split(tiny_adapter / "adapter_model.safetensors")
    text = json.dumps(data.draw(damaged(header))).encode()
    content = struct.pack("<Q", len(text)) + text + tensors
    read_adapter(rewrite(tiny_adapter, tmp_path / "copy", "adapter_model.safetensors", content), tiny[0])
