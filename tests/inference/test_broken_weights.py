"""Logits that are not finite: the tensor and its file are named, whatever computes with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llamatune.command_options.inference import EvaluateOptions, ModelSource, Sampling
from llamatune.data.templates import Template
from llamatune.errors import NumericsError
from llamatune.inference.chat import open_chat
from llamatune.inference.evaluate import evaluate_prepared
from llamatune.inference.generate import generate

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=[(float("nan"), "holds NaN or infinity"), (3e38, "holds a weight of magnitude 3e\\+38")])
def broken(request: pytest.FixtureRequest, tiny_base: Callable[..., Path], tmp_path: Path) -> tuple[Path, str]:
    """A base with one broken weight, and what is said of it."""
    value, said = request.param
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    weights = load_file(base / "model.safetensors")
    weights[NAME][:2] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base, f"{NAME} {said} in {base / 'model.safetensors'}"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"num_beams": 2}])
def test_generate_names_the_tensor(broken: tuple[Path, str], options: dict[str, float]) -> None:
    base, said = broken
    sampling = Sampling(4, **{"temperature": 0, **options})
    with pytest.raises(NumericsError, match=said) as raised:
        generate(ModelSource(base, device="cpu"), ["a red llama"], sampling, "none")
    assert str(raised.value).count(NAME) == 1


def test_evaluate_names_the_tensor(broken: tuple[Path, str], prepared: Callable[..., Path]) -> None:
    base, said = broken
    with pytest.raises(NumericsError, match=said):
        evaluate_prepared(EvaluateOptions(model=base, data=prepared(), device="cpu"))


def test_chat_names_the_tensor_once(broken: tuple[Path, str]) -> None:
    base, said = broken
    template = Template("plain", "{instruction}\n")
    with (
        pytest.raises(NumericsError, match=said) as raised,
        open_chat(ModelSource(base, device="cpu"), template) as chat,
    ):
        list(chat.answer("a red llama", Sampling(4, temperature=0)))
    assert str(raised.value).count(NAME) == 1
