"""Every verb that reads a base reads the variant of its weights that is asked for, and names the flag where it must."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import spec_values


@pytest.fixture
def base(tiny_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of which there is the variant fp16 alone."""
    path = tmp_path / "base"
    path.mkdir()
    for file in tiny_base().iterdir():
        (path / file.name.replace("model.safetensors", "model.fp16.safetensors")).write_bytes(file.read_bytes())
    return path


def test_every_verb_takes_a_variant(
    command: Callable[..., Any], base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    data, run, spec = prepared(), tmp_path / "run", tmp_path / "run.yaml"
    spec.write_text(json.dumps(spec_values(base, data, run, training__max_steps=1)))
    adapter, named = ("--adapter", run / "adapter"), "pass --variant fp16 (of a run: model.variant=fp16)"
    of_verbs: list[tuple[list[object], list[object]]] = [
        (["count-params", "--model", base], ["--variant", "fp16"]),
        (["plan-memory", spec], ["model.variant=fp16"]),
        (["train", spec], ["model.variant=fp16"]),
        (["generate", "--model", base, *adapter, "--prompt", "a", "--max-new-tokens", 2], ["--variant", "fp16"]),
        (["evaluate", "--model", base, *adapter, "--data", data], ["--variant", "fp16"]),
        (["merge-lora", "--model", base, *adapter, "--output", tmp_path / "merged"], ["--variant", "fp16"]),
        (["verify", base], ["--variant", "fp16"]),
        (["report", run, "--output", tmp_path / "r.html", "--prompt", "a", "--max-new-tokens", 2], []),
    ]
    for words, variant in of_verbs:
        if variant:
            refused = command(*words)
            assert (refused.code, named in refused.stderr) == (4, True), (words, refused)
        outcome = command(*words, *variant)
        assert outcome.code == 0, (words, outcome.stderr)
    assert command("verify", tmp_path / "merged").code == 0
    assert command("count-params", "--preset", "llama-2-7b", "--variant", "fp16").code == 2
