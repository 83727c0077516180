"""Full fine-tuning on several ranks: the numbers of one process, and a comparison that sees each wrong way.

Gradients are summed in another order than in one process: losses, norms and weights agree up to rounding. The ranks are
real processes that meet through gloo. The last window of an epoch has fewer passes than there are ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import assert_same_outcome, last_checkpoint, metrics
from safetensors.torch import load_file
from slow_cases import slow

Trained = Callable[..., Path]
CLOSE = 1e-5

FULL: dict[str, Any] = {
    "lora": None, "training__learning_rate": 0.01, "training__max_steps": 4, "training__save_every_steps": 2,
    "training__max_grad_norm": 1.0, "evaluation__every_steps": 2,
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"training__optimizer": "sgd"},
    "momentum": {"training__optimizer": "sgd", "training__momentum": 0.9, "training__weight_decay": 0.1},
    "adamw": {"training__optimizer": "adamw", "training__weight_decay": 0.1},
    "adamw_8bit": {"training__optimizer": "adamw_8bit", "training__weight_decay": 0.1},
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "recomputed": {"training__activation_checkpointing": "block"},
    "recomputed by halves": {"training__activation_checkpointing": "sublayer"},
    "packed": {"data__packing": True, "data__packed_tokens": 40},
    "joined passes": {"training__tokens_per_pass": 60},
    "drawn weights": {"model__init": "random"},
    "answers": {"evaluation__prompts": 2, "evaluation__max_new_tokens": 6},
    "norms of layers": {"training__log_layer_grad_norms": True},
    "two epochs": {"training__max_steps": None, "training__num_epochs": 2, "training__learning_rate": 1e-3},
    "no validation": {"data__validation": None, "evaluation": {}},
}


def change(**changes: Any) -> dict[str, Any]:
    return {**FULL, **changes}


def difference(found: Path, expected: Path) -> float:
    """The largest relative one: of losses, norms, and the weights of best/ and model/ (norms of whole tensors)."""
    pairs = []
    for ours, theirs in zip(metrics(found), metrics(expected), strict=True):
        assert ours.keys() == theirs.keys()
        keys = [key for key in ("loss", "grad_norm") if key in ours]
        pairs += [(ours[key], theirs[key]) for key in keys]
        pairs += [(ours["norms"][name], norm) for name, norm in theirs.get("norms", {}).items()]
    largest = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    for product in ("best", "model"):
        if (expected / product).exists() or (found / product).exists():
            weights = [load_file(run / product / "model.safetensors") for run in (found, expected)]
            assert weights[0].keys() == weights[1].keys()
            apart = [float((weights[0][name] - tensor).norm() / tensor.norm()) for name, tensor in weights[1].items()]
            largest = max(largest, *apart)
    return largest


@pytest.mark.parametrize("rule", [slow("sgd"), slow("momentum"), "adamw", "adamw_8bit"])
def test_ranks_agree_with_one_process(trained: Trained, alone: Trained, rule: str) -> None:
    expected = alone(change(**RULES[rule]))
    assert len(metrics(expected, "step")) == 4
    for size in (2, 4):
        assert difference(trained(size, change(**RULES[rule])), expected) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_agree_with_one_process(trained: Trained, alone: Trained, name: str, size: int) -> None:
    assert difference(trained(size, change(**TECHNIQUES[name])), alone(change(**TECHNIQUES[name]))) < CLOSE


def test_a_tail_with_fewer_passes_than_ranks(trained: Trained, alone: Trained) -> None:
    """Windows 12 and 24 have 2 micro-batches for 4 ranks."""
    changes = change(training__max_steps=13, training__learning_rate=1e-3, **RULES["momentum"])
    assert difference(trained(4, changes), alone(changes)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_products(trained: Trained, alone: Trained, precision: str) -> None:
    """Each product is rounded alike; sums in another order can be rounded to another neighbour."""
    changes = change(training__precision=precision, training__learning_rate=1e-3)
    assert difference(trained(2, changes), alone(changes)) < 1e-2


def test_ranks_skip_the_same_windows_when_fp16_overflows(trained: Trained, alone: Trained) -> None:
    changes, high = change(training__precision="fp16", training__learning_rate=1e-3), {"loss_scale": 2.0**26}
    found, expected = trained(3, changes, **high), alone(changes, **high)
    skipped = [json.loads((run / "summary.json").read_text())["skipped_windows"] for run in (found, expected)]
    assert skipped[0] == skipped[1] > 0
    assert difference(found, expected) < 1e-2


@pytest.mark.slow
def test_compiled(trained: Trained, alone: Trained) -> None:
    changes = change(training__compile=True)
    assert difference(trained(2, changes), alone(changes)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "meta", "qwen 3"])
def test_other_bases(
    trained: Trained, alone: Trained, tiny_base: Callable[..., Path], meta_copy: Callable[..., Path], kind: str
) -> None:
    qwen = {"model_type": "qwen3", "attention_bias": True, "head_dim": 10}
    made = tiny_base(**{"tied": {"tie_word_embeddings": True}, "qwen 3": qwen}.get(kind, {}))
    base = meta_copy(made) if kind == "meta" else made
    changes = change(model={"path": str(base), "dtype": "float32"})
    for size in (2, 3):
        assert difference(trained(size, changes), alone(changes)) < CLOSE


@pytest.mark.slow
def test_the_same_number_of_ranks_gives_the_same_bytes(trained: Trained) -> None:
    changes = change(**RULES["adamw_8bit"])
    first, second = (trained(3, changes, name) for name in ("first", "second"))
    for run in (first, second):
        (last_checkpoint(run) / "optimizer.safetensors").write_bytes(b"")  # which one process would have written
    assert_same_outcome(first, second)
    shards = [sorted(last_checkpoint(run).glob("shard-*")) for run in (first, second)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_a_rank_reads_its_rows_and_nothing_else(trained: Trained, tmp_path: Path) -> None:
    log, weights = tmp_path / "reads", 0
    run = trained(4, change(), broken="broken_shards.log_reads", environment={"LOG_READS": str(log)})
    for tensor in load_file(run / "model" / "model.safetensors").values():
        weights += tensor.numel()
    read = [sum(map(json.loads, log.with_suffix(f".{rank}").read_text().split())) for rank in range(4)]
    assert sum(read) == weights
    assert max(read) < 0.3 * weights


# What is done wrongly is seen


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        slow("mean_of_ranks", "sgd"),
        ("idle_pass_that_counts", "sgd"),
        slow("own_norm", "sgd"),
        ("blocks_of_slices", "adamw_8bit"),
    ],
)
def test_a_wrong_share_fails_the_comparison(trained: Trained, alone: Trained, wrong: str, rule: str) -> None:
    changes = change(**RULES[rule])
    size = 3 if wrong == "idle_pass_that_counts" else 4  # 4 micro-batches leave no rank of 4 idle
    assert difference(trained(size, changes, wrong, broken=f"broken_shards.{wrong}"), alone(changes)) > 10 * CLOSE
