"""``generate`` and ``evaluate`` with ``--dtype nf4``, ``float8`` and ``int8``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import make_spec, metrics

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import EvaluateOptions, ModelSource
from llamatune.events import ignore_event, never_stop
from llamatune.inference import model_source
from llamatune.inference.evaluate import evaluate_prepared
from llamatune.inference.model_source import open_model
from llamatune.model.packed_weight import PackedWeight, quantize_blocks
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.transformer import Transformer
from llamatune.training.train import train

KINDS = pytest.mark.parametrize("kind", list(QUANTIZATIONS))


def loaded(source: ModelSource) -> dict[str, Transformer]:
    return open_model(source).load(ignore_event, never_stop).by_prefix


def packed_weights(model: Transformer) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


@KINDS
def test_the_blocks_are_quantised_and_the_rest_is_held_in_16_bits(
    kind: str, tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 131, (2, 9))
    for lacking, held in ((False, torch.bfloat16), (True, torch.float16)):
        monkeypatch.setattr(model_source, "lacks_bf16", lambda _, lacking=lacking: lacking)
        (model,) = loaded(ModelSource(tiny_base(), dtype=kind, device="cpu")).values()  # type: ignore[arg-type]
        assert {type(weight) for weight in packed_weights(model)} == {QUANTIZATIONS[kind]}
        assert {parameter.dtype for parameter in model.parameters()} == {held}
        expected = load_model(tiny_base(), torch.float32, writable=True)
        quantize_blocks(expected, QUANTIZATIONS[kind], held)
        with torch.no_grad():
            assert torch.equal(model(ids), expected.eval()(ids))


@KINDS
def test_base_and_tuned_share_their_quantised_weights(
    kind: str, tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base()
    source = ModelSource(base, peft_adapter(base), compare=True, dtype=kind, device="cpu")  # type: ignore[arg-type]
    models = loaded(source)
    own, others = packed_weights(models[""]), packed_weights(models["base_"])
    assert len(own) == 7 * models[""].config.num_hidden_layers
    assert all(mine is theirs for mine, theirs in zip(own, others, strict=True))
    assert [name for name, _ in models[""].named_parameters() if "lora_" in name]


@KINDS
def test_a_runs_validation_loss_is_that_of_evaluate(
    kind: str, tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    base, data = tiny_base(), prepared(validation_fraction=0.25, seed=3)
    run = {"model__dtype": kind, "training__precision": "bf16", "training__learning_rate": 0.03}
    train(make_spec(base, data, tmp_path / "run", **run, training__max_steps=4))
    expected = metrics(tmp_path / "run", "eval")[-1]["loss"]
    asked = {"model": base, "adapter": tmp_path / "run" / "adapter", "data": data, "device": "cpu"}
    found = evaluate_prepared(EvaluateOptions(**asked, dtype=kind)).to_dict()
    assert found["dtype"] == kind
    assert found["loss"] == pytest.approx(expected, abs=5e-3)
    placed = evaluate_prepared(EvaluateOptions(**asked, dtype=kind, placement="host")).to_dict()
    assert placed == found
    other = evaluate_prepared(EvaluateOptions(**asked, dtype="float32")).to_dict()
    assert found["loss"] != other["loss"], "nothing was quantised"


@KINDS
def test_the_command_line_generates(
    kind: str, command: Callable[..., Any], tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base()
    words = ("generate", "--model", base, "--adapter", peft_adapter(base), "--compare", "--prompt", "a red llama",
             "--temperature", "0", "--max-new-tokens", "9", "--dtype", kind, "--json")  # fmt: skip
    done, placed = command(*words), command(*words, "--placement", "host")
    assert done.code == placed.code == 0, done.stderr + placed.stderr
    (result,), (other,) = json.loads(done.stdout)["results"], json.loads(placed.stdout)["results"]
    assert result == other
    assert len(result["completion_ids"]) in range(1, 10)
    refused = command("merge-lora", "--model", base, "--adapter", "x", "--output", "y", "--dtype", kind)
    assert refused.code == 2
    assert "--dtype" in refused.stderr


def test_int8_logits_are_near_those_of_the_model_and_decoding_uses_the_kernel(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(hidden_size=96, intermediate_size=128)  # whole vectors of columns
    (model,) = loaded(ModelSource(base, dtype="int8", device="cpu")).values()
    (plain,) = loaded(ModelSource(base, dtype="bfloat16", device="cpu")).values()
    asked, kernel = [], torch._weight_int8pack_mm

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        asked.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    for ids, uses in ((torch.randint(3, 131, (1, 4)), True), (torch.randint(3, 131, (2, 9)), False)):
        asked.clear()
        with torch.inference_mode():
            found, expected = model(ids).double(), plain(ids).double()
        assert bool(asked) is uses
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_quantised_dtypes_that_are_unknown_are_refused_in_one_line(
    command: Callable[..., Any], tiny_base: Callable[..., Path]
) -> None:
    for verb in (("generate", "--prompt", "a"), ("evaluate", "--data", "x")):
        refused = command(*verb, "--model", tiny_base(), "--dtype", "int4")
        assert refused.code == 2
        assert "int8" in refused.stderr
        assert "Traceback" not in refused.stderr
