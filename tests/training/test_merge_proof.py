"""The share of the gain that a merge keeps: transformers' and PEFT's losses, and refused where too little is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import make_spec

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.data.batches import open_prepared
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import Event, Notice
from llamatune.merge_proof import merge_and_prove
from llamatune.model.float8 import Float8Weight
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import Scratch
from llamatune.training.train import train

Trained = Callable[..., Path]
LOW_RANK = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base(torch.bfloat16)


@pytest.fixture(scope="module")
def rows(prepared: Callable[..., Path]) -> Path:
    return prepared(validation_fraction=0.3, seed=1)


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The adapter of a run with some changes; each run is made once."""
    made: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("run") / "run"
            train(make_spec(base, rows, output, lora=LOW_RANK, **changes))
            made[key] = output / "adapter"
        return made[key]

    return run


def judged(model: torch.nn.Module, rows: Path) -> float:
    """transformers' mean loss per target token of the validation rows, one by one."""
    split, summed, targets = open_prepared(rows).validation, 0.0, 0
    assert split is not None
    for batch in split.batches(1):
        with torch.no_grad():
            found = model(batch.input_ids, labels=batch.labels).loss
        summed, targets = summed + float(found) * batch.target_tokens, targets + batch.target_tokens
    return summed / targets


def test_the_losses_are_those_of_transformers_and_peft(
    base: Path, rows: Path, trained: Trained, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    options = MergeOptions(base, trained(), tmp_path / "out", probe=Path("run"))
    report = merge_and_prove(options)
    before, merged = judged(load(base), rows), judged(load(tmp_path / "out"), rows)
    tuned = judged(PeftModel.from_pretrained(load(base), trained()), rows)
    assert report.dtype == "bfloat16"
    assert before - tuned > 0.15
    assert report.probe_base_loss == pytest.approx(before, rel=1e-5)
    assert report.probe_tuned_loss == pytest.approx(tuned, rel=1e-5)
    assert report.probe_merged_loss == pytest.approx(merged, rel=1e-5)
    assert report.probe_gain_kept == pytest.approx((before - merged) / (before - tuned), abs=1e-4)
    assert report.probe_gain_kept is not None
    assert report.probe_gain_kept > 0.98  # roundings of so few weights do not average out
    halves = merge_and_prove(dataclasses.replace(options, output=tmp_path / "halves", dtype="float16"))
    assert halves.probe_gain_kept is not None
    assert halves.probe_gain_kept > 0.999
    stored = json.loads((tmp_path / "out" / "llamatune.json").read_text())["facts"]["report"]
    assert stored["probe_gain_kept"] == report.probe_gain_kept
    assert merge_and_prove(options) == dataclasses.replace(report, already_done=True)
    assert merge_lora(MergeOptions(base, trained(), tmp_path / "plain")).probe_gain_kept is None


def test_a_file_of_rows_is_encoded_as_the_adapters_rows_were(
    base: Path, trained: Trained, tiny_rows: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    lines = [line for line in tiny_rows.read_text().splitlines() if 0 < len(json.loads(line)["completion"]) < 60]
    few.write_text("\n".join(lines[:7]) + "\n")
    of_file = merge_and_prove(MergeOptions(base, trained(), tmp_path / "one", probe=few))
    encoded = prepared(rows=few, validation_fraction=0, max_seq_length=512)
    of_prepared = merge_and_prove(MergeOptions(base, trained(), tmp_path / "two", probe=encoded))
    assert of_file.probe_rows == 7
    assert dataclasses.replace(of_file, output="") == dataclasses.replace(of_prepared, output="")
    with pytest.raises(SpecError, match="--output would replace --probe"):
        merge_and_prove(MergeOptions(base, trained(), tmp_path, probe=few, overwrite=True))
    unnamed = merge_and_prove(MergeOptions(base, trained(), tmp_path / "three", probe=few, template="none"))
    assert dataclasses.replace(unnamed, output="") == dataclasses.replace(of_file, output="")


def test_a_merge_that_loses_the_gain_is_refused_and_in_fp32_it_is_not(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    """Updates of less than half a step of bf16 vanish all together."""
    adapter = trained(training__learning_rate=1e-5)
    options = MergeOptions(base, adapter, tmp_path / "out", probe=Path("run"))
    with pytest.raises(CheckpointError, match=r"keeps -?0\.\d+ of .*--least-kept 0\.9.*--dtype float32"):
        merge_and_prove(options)
    assert list(tmp_path.iterdir()) == []
    told = merge_and_prove(dataclasses.replace(options, least_kept=-1.0))
    assert told.probe_gain_kept is not None
    assert told.probe_gain_kept < 0.5
    whole = merge_and_prove(dataclasses.replace(options, output=tmp_path / "whole", dtype="float32"))
    assert whole.probe_gain_kept == pytest.approx(1, abs=0.05)


@pytest.fixture(params=[("nf4", NF4Weight), ("float8", Float8Weight)])
def quantized(request: pytest.FixtureRequest, trained: Trained) -> tuple[str, Any, Path]:
    name, kind = request.param
    return name, kind, trained(model__dtype=name, training__precision="bf16")


def test_an_adapter_of_a_quantised_base_says_so_and_is_folded_into_what_training_saw(
    base: Path, quantized: tuple[str, Any, Path], tmp_path: Path
) -> None:
    name, kind, adapter = quantized
    assert load_adapter(adapter).base_dtype == name
    events: list[Event] = []
    plain = merge_and_prove(
        MergeOptions(base, adapter, tmp_path / "plain", probe=Path("run"), least_kept=-9), events.append
    )
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any(f"trained on a base in {name}" in line and "--onto-quantized" in line for line in told)
    options = MergeOptions(base, adapter, tmp_path / "out", probe=Path("run"), onto_quantized=True)
    report = merge_and_prove(options, events.append)
    assert report.probe_gain_kept == pytest.approx(1, abs=0.02)
    assert plain.probe_gain_kept is not None
    if name == "nf4":  # float8 is so near that roundings to bf16 differ as much
        assert abs(report.probe_gain_kept - 1) < abs(plain.probe_gain_kept - 1)
    assert (plain.probe_base_loss, plain.probe_tuned_loss) == (report.probe_base_loss, report.probe_tuned_loss)
    stored, merged, found = open_checkpoint(base), open_checkpoint(tmp_path / "out"), load_adapter(adapter)
    for weight in stored.shapes:
        W = stored.tensor(weight)
        if factors := found.trained(weight):
            W = kind.quantize(W, Scratch()).unpacked(torch.bfloat16)
            W = (W.float() + (factors[1] @ factors[0]) * 2).bfloat16()
        assert torch.equal(merged.tensor(weight), W), weight


def test_only_an_adapter_that_says_so_is_merged_onto_quantised_weights(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="not every adapter says that it was trained on a base in the same"):
        merge_lora(MergeOptions(base, trained(), tmp_path / "out", onto_quantized=True))


def test_an_adapter_that_gains_nothing_has_no_share_to_keep(
    base: Path, rows: Path, trained: Trained, tmp_path: Path
) -> None:
    events: list[Event] = []
    report = merge_and_prove(
        MergeOptions(base, trained(), tmp_path / "out", weights=(-1.0,), probe=rows), events.append
    )
    assert report.probe_gain_kept is None
    assert any(isinstance(event, Notice) and "gains nothing" in event.message for event in events)


def test_where_the_rows_of_the_run_are_not_found_it_says_what_to_give(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained(), adapter)
    options = MergeOptions(base, adapter, tmp_path / "out", probe=Path("run"))
    with pytest.raises(SpecError, match=r"in no run directory.*give rows with --probe"):
        merge_and_prove(options)
    run = tmp_path / "moved"
    shutil.copytree(trained().parent, run)
    spec = (run / "spec.yaml").read_text().splitlines()
    (run / "spec.yaml").write_text(
        "\n".join("  train: gone" if line.startswith("  train:") else line for line in spec) + "\n"
    )
    with pytest.raises(SpecError, match="the rows of the run are not at gone"):
        merge_and_prove(dataclasses.replace(options, adapter=run / "adapter"))


@pytest.mark.parametrize("given", [{"least_kept": 0.5}, {"device": "cpu"}])
def test_options_of_the_probe_need_one(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="it needs --probe"):
        MergeOptions(tmp_path, tmp_path, tmp_path, **given)
