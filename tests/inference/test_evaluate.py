"""Loss, perplexity and token accuracy of prepared rows, row by row, against transformers; and how sure they are."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamatune.command_options.inference import EvaluateOptions, ModelSource
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.errors import CheckpointError, DataError, NumericsError, SpecError, Stopped
from llamatune.inference.evaluate import PreparedReport, evaluate_prepared
from llamatune.inference.model_source import open_model
from llamatune.inference.significance import exact_mcnemar, ratio_interval, score_interval

Z = 1.959963984540054


def judged(model: torch.nn.Module, prepared: Path, split: str = "train", batch: int = 7) -> list[dict[str, Any]]:
    """Every row's loss and right tokens by transformers, ``batch`` rows at a time, padded on the right."""
    stored = load_file(prepared / f"{split}.safetensors")
    bounds = stored["offsets"].tolist()
    rows = [(stored["input_ids"][a:b].long(), stored["loss_mask"][a:b].bool()) for a, b in itertools.pairwise(bounds)]
    found = []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        width = max(len(ids) for ids, _ in part)
        padded = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids)), value=2) for ids, _ in part])
        attended = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        with torch.no_grad():
            logits = model(padded, attention_mask=attended).logits.float()
        for (ids, mask), row in zip(part, logits, strict=True):
            at = mask.nonzero().squeeze(1)
            losses = -row[at - 1].log_softmax(-1)[range(len(at)), ids[at]]
            right = int((row[at - 1].argmax(-1) == ids[at]).sum())
            found.append({"tokens": len(ids), "targets": len(at), "loss": math.fsum(losses.tolist()), "right": right})
    return found


def agree(report: PreparedReport, judge: list[dict[str, Any]]) -> None:
    rows = list(report.per_row())
    assert len(rows) == len(judge)
    for row, expected in zip(rows, judge, strict=True):
        assert (row["tokens"], row["target_tokens"]) == (expected["tokens"], expected["targets"])
        assert row["loss"] == pytest.approx(expected["loss"] / expected["targets"], abs=1e-5)
        assert row["correct_tokens"] == expected["right"]
    total = report.to_dict()
    targets = sum(row["targets"] for row in judge)
    loss = math.fsum(row["loss"] for row in judge) / targets
    assert total["target_tokens"] == targets
    assert total["loss"] == pytest.approx(loss, abs=1e-5)
    assert total["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert total["token_accuracy"] == sum(row["right"] for row in judge) / targets


def evaluation(**options: Any) -> EvaluateOptions:
    return EvaluateOptions(device="cpu", **options)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture(scope="module")
def judge(base: Path, prepared: Callable[..., Path]) -> list[dict[str, Any]]:
    from transformers import LlamaForCausalLM

    return judged(LlamaForCausalLM.from_pretrained(base), prepared())


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_every_rows_loss_is_that_of_transformers(
    base: Path, prepared: Callable[..., Path], judge: list[dict[str, Any]], batch_size: int
) -> None:
    agree(evaluate_prepared(evaluation(model=base, data=prepared(), batch_size=batch_size)), judge)


def test_a_hundred_real_rows_are_scored_as_by_transformers(shared_fixtures: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base = shared_fixtures / "stories260K-hf"
    rows = shared_fixtures / "data" / "alpaca_data_200.json"
    prepare_data(PrepareOptions([rows], base, tmp_path / "data", max_seq_length=300, limit=130))
    expected = judged(LlamaForCausalLM.from_pretrained(base), tmp_path / "data", batch=10)[:100]
    assert len(expected) == 100
    for batch_size in (1, 3, 8):
        asked = evaluation(model=base, data=tmp_path / "data", batch_size=batch_size, limit=100)
        agree(evaluate_prepared(asked), expected)


def test_base_and_tuned_side_by_side_are_what_each_is_alone(
    base: Path, prepared: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    adapter = peft_adapter(base)
    both = evaluate_prepared(evaluation(model=base, data=prepared(), adapter=adapter, compare=True))
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    before, after = both.to_dict(), evaluate_prepared(evaluation(model=base, data=prepared())).to_dict()
    agree(both, judged(tuned, prepared()))
    assert {name: before[f"base_{name}"] for name in ("loss", "perplexity", "token_accuracy")} == {
        name: after[name] for name in ("loss", "perplexity", "token_accuracy")
    }
    rows = list(both.per_row())
    assert before["loss_difference"] == pytest.approx(before["loss"] - before["base_loss"])
    low, high = before["loss_difference_interval"]
    assert low < before["loss_difference"] < high
    assert before["improved_rows"] == sum(row["loss"] < row["base_loss"] for row in rows)


def test_base_and_tuned_share_their_frozen_weights(base: Path, peft_adapter: Callable[..., Path]) -> None:
    models = (
        open_model(ModelSource(base, peft_adapter(base), compare=True, device="cpu"))
        .load(lambda event: None, lambda: False)
        .by_prefix
    )
    own = {name: parameter for name, parameter in models[""].named_parameters() if "lora_" not in name}
    assert all(parameter is own[name] for name, parameter in models["base_"].named_parameters())
    assert not [name for name, _ in models["base_"].named_parameters() if "lora_" in name]


def test_the_split_is_validation_where_there_is_one(base: Path, prepared: Callable[..., Path]) -> None:
    whole, held_out = prepared(), prepared(validation_fraction=0.3)

    def of(data: Path, **options: Any) -> dict[str, Any]:
        return evaluate_prepared(evaluation(model=base, data=data, **options)).to_dict()

    assert of(whole)["split"] == "train"
    assert of(held_out) == of(held_out, split="validation")
    parts = [of(held_out, split=name) for name in ("train", "validation", "all")]
    assert [part["rows"] for part in parts[:2]] == [len(rows) - 1 for rows in (
        load_file(held_out / f"{name}.safetensors")["offsets"] for name in ("train", "validation"))]  # fmt: skip
    assert parts[2]["rows"] == parts[0]["rows"] + parts[1]["rows"]
    weights = [part["target_tokens"] for part in parts]
    assert parts[2]["loss"] * weights[2] == pytest.approx(sum(p["loss"] * p["target_tokens"] for p in parts[:2]))
    few = evaluate_prepared(evaluation(model=base, data=held_out, split="all", limit=2))
    assert [row["split"] for row in few.per_row()] == ["train"] * 2 + ["validation"] * 2
    with pytest.raises(SpecError, match="no validation rows"):
        of(whole, split="validation")
    with pytest.raises(SpecError, match="--split is 'test'"):
        of(whole, split="test")


def test_what_cannot_be_evaluated(
    base: Path, tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    for options, fault in (
        ({"limit": 0}, SpecError), ({"batch_size": 0}, SpecError), ({"compare": True}, SpecError),
        ({"data": tmp_path}, DataError), ({"model": tmp_path}, CheckpointError),
        ({"model": tiny_base(vocab_size=60)}, CheckpointError),
    ):  # fmt: skip
        settings: dict[str, Any] = {"model": base, "data": prepared(), **options}
        with pytest.raises(fault):
            evaluate_prepared(evaluation(**settings))
    with pytest.raises(Stopped):
        evaluate_prepared(evaluation(model=base, data=prepared()), should_stop=lambda: True)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match="row 2"):  # the first row was dropped: it has no target token
        evaluate_prepared(evaluation(model=broken, data=prepared()))


# How sure a number is.


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_where_the_score_test_turns(counts: tuple[int, int]) -> None:
    """Each bound p solves |right/n - p| = z sqrt(p (1 - p) / n): found here by bisection."""
    right, n = counts
    share = right / n

    def bound(outer: float) -> float:
        inner = share
        for _ in range(200):
            middle = (inner + outer) / 2
            rejected = abs(share - middle) > Z * math.sqrt(middle * (1 - middle) / n)
            inner, outer = (inner, middle) if rejected else (middle, outer)
        return inner

    low, high = score_interval(right, n)
    assert low == pytest.approx(bound(0.0), abs=1e-9)
    assert high == pytest.approx(bound(1.0), abs=1e-9)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("discordant", range(11))
def test_mcnemars_p_value_is_the_share_of_outcomes_at_least_as_uneven(discordant: int) -> None:
    """Under the null each question that only one model got right is a fair coin: all 2^n outcomes are counted."""
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=discordant)]
    for alone in range(discordant + 1):
        uneven = abs(2 * alone - discordant)
        share = sum(abs(2 * heads - discordant) >= uneven for heads in outcomes) / len(outcomes)
        assert exact_mcnemar(alone, discordant - alone) == pytest.approx(share, abs=1e-12)


def test_the_interval_of_a_mean_is_the_textbooks_and_of_a_ratio_the_jackknifes() -> None:
    chance = random.Random(6)
    values = [chance.gauss(0.3, 2.0) for _ in range(41)]
    low, high = ratio_interval(values, [1] * 41) or (0.0, 0.0)
    half = Z * statistics.stdev(values) / math.sqrt(41)
    assert (low, high) == pytest.approx((statistics.mean(values) - half, statistics.mean(values) + half))
    weights = [chance.randrange(1, 60) for _ in range(400)]
    sums = [weight * chance.gauss(-0.2, 0.5) for weight in weights]
    low, high = ratio_interval(sums, weights) or (0.0, 0.0)
    without = [(sum(sums) - s) / (sum(weights) - w) for s, w in zip(sums, weights, strict=True)]
    spread = math.sqrt(399 / 400 * sum((one - statistics.mean(without)) ** 2 for one in without))
    assert (high - low) / 2 == pytest.approx(Z * spread, rel=0.01)
    assert (high + low) / 2 == pytest.approx(sum(sums) / sum(weights))
    assert ratio_interval([1.0], [3]) is None
