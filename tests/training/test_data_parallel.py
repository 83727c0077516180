"""Data-parallel training: the same bytes on any number of ranks, and a comparison that sees each wrong way.

The ranks are real processes that meet through gloo, forked from a parent that has loaded torch. Micro-batches of 2
ragged rows, windows of 4 of them, dropout; the last window of an epoch has fewer micro-batches than there are ranks.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_tools import free_port, rank_variables
from run_tools import assert_same_outcome, metrics, outcome

import llamatune

Trained = Callable[..., Path]

COMMON: dict[str, dict[str, Any]] = {
    "micro-batches": {},
    "joined passes": {"training__tokens_per_pass": 60},
    "packed": {
        "data__packing": True, "data__packed_tokens": 40, "training__max_grad_norm": 0.5, "training__num_epochs": 2.5,
        "training__gradient_accumulation_steps": 3,
    },
}  # fmt: skip
RARE: dict[str, dict[str, Any]] = {
    "nf4": {"model__dtype": "nf4"},
    "bf16": {"training__precision": "bf16"},
    "adamw_8bit": {"training__optimizer": "adamw_8bit", "lora": {"r": 64, "alpha": 64, "dropout": 0.1}},
    "plain modules": {"training__fused": False, "training__activation_checkpointing": "sublayer"},
    "13 micro-batches": {"training__gradient_accumulation_steps": 13, "training__log_layer_grad_norms": True},
    "packed and joined": {"data__packing": True, "data__packed_tokens": 40, "training__tokens_per_pass": 100},
    "dora": {"lora": {"kind": "dora", "r": 4, "dropout": 0.1, "target_modules": "all-linear"}},
    "pissa, embedding and head whole": {
        "lora": {"init": "pissa", "r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    },
    "pissa, lora+": {"lora": {"init": "pissa", "r": 4, "lr_ratio": 4.0}},
    "no validation": {"data__validation": None, "evaluation": {}},
    "answers": {"evaluation__prompts": 3, "evaluation__max_new_tokens": 7},
    "answers, shards": {
        "evaluation__prompts": 3, "evaluation__max_new_tokens": 7, "model__placement": "shard", "model__dtype": "nf4",
    },
    "early stopping": {
        "training__learning_rate": 0.3, "training__num_epochs": 5, "evaluation__every_steps": 2,
        "evaluation__early_stopping_patience": 2,
    },
}  # fmt: skip


# The same bytes


@pytest.mark.parametrize("name", COMMON)
def test_any_number_of_ranks_gives_the_bytes_of_one(trained: Trained, alone: Trained, name: str) -> None:
    expected = alone(COMMON[name])
    assert len(metrics(expected, "step")) >= 8
    assert len(metrics(expected, "eval")) >= 2
    for size in (2, 3, 4):
        assert_same_outcome(trained(size, COMMON[name]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RARE)
def test_other_techniques_give_the_bytes_of_one_process(trained: Trained, alone: Trained, name: str) -> None:
    for size in (2, 4):
        assert_same_outcome(trained(size, RARE[name]), alone(RARE[name]))


def test_techniques_that_round_give_the_bytes_of_one_process(trained: Trained, alone: Trained) -> None:
    lora = {"r": 64, "alpha": 64, "dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    changes = {**RARE["nf4"], **RARE["bf16"], **RARE["adamw_8bit"], "lora": lora, "training__max_steps": 4}
    assert_same_outcome(trained(2, changes), alone(changes))


def test_ranks_skip_the_same_windows_when_fp16_overflows(trained: Trained, alone: Trained) -> None:
    changes = {"training__precision": "fp16"}
    expected = alone(changes, loss_scale=2.0**26)
    assert outcome(expected)["summary"]["skipped_windows"] > 0
    assert_same_outcome(trained(4, changes, loss_scale=2.0**26), expected)


def test_full_fine_tuning_agrees_with_one_process(trained: Trained, alone: Trained) -> None:
    """Its gradients are summed in any order: the same numbers, not the same bytes."""
    changes = {"lora": None, "training__learning_rate": 1e-3, "training__optimizer": "sgd"}
    expected = metrics(alone(changes), "step")
    found = metrics(trained(4, changes), "step")
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=1e-5)


def test_processes_that_nothing_was_loaded_for(
    alone: Trained, rank_job: Callable[..., list[str]], tmp_path: Path
) -> None:
    """As users start them: each a Python of its own."""
    port, run = free_port(), tmp_path / "cold"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llamatune", *rank_job(), f"training.output_dir={run}"],
            env={**os.environ, "PYTHONPATH": str(Path(llamatune.__file__).parents[1]), **rank_variables(rank, 2, port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(said[0][0])["steps"] == 12
    assert said[1] == ("", "")
    assert_same_outcome(run, alone())


# What is done wrongly is seen


def largest_difference(found: Path, expected: Path, key: str) -> float:
    """Of the steps' values, relative to the right one."""
    pairs = zip(metrics(found, "step"), metrics(expected, "step"), strict=True)
    return max(abs(ours[key] / theirs[key] - 1) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("wrong", "least", "most"),
    [
        ("mean_per_rank", 0.01, 9),
        ("mean_per_micro_batch", 0.01, 9),
        ("dropout_by_local_index", 0.01, 9),
        ("repeated_row", 0.01, 9),
        ("sum_in_rank_order", 0, 1e-4),  # rounding alone
    ],
)
def test_a_wrong_share_fails_the_comparison(
    trained: Trained, alone: Trained, wrong: str, least: float, most: float
) -> None:
    found = trained(4, name=wrong, broken=f"broken_ranks.{wrong}")
    with pytest.raises(AssertionError):
        assert_same_outcome(found, alone())
    assert least < largest_difference(found, alone(), "grad_norm") < most


def test_a_repeated_row_shows_in_the_last_window_of_an_epoch_alone(trained: Trained, alone: Trained) -> None:
    """So a comparison without such a window would not see it."""
    changes = {"training__max_steps": 11, "evaluation__every_steps": 11}
    assert_same_outcome(trained(4, changes, broken="broken_ranks.repeated_row"), alone(changes))


@pytest.mark.parametrize("rows", [91, 95])
def test_every_row_is_computed_once_in_an_epoch(trained: Trained, tmp_path: Path, rows: int) -> None:
    """95 rows leave a last window of 7, 4 micro-batches, the last of one row."""
    log = tmp_path / "rows"
    for size in (2, 4):
        trained(
            size, {"rows": rows, "training__num_epochs": 2}, broken="broken_ranks.log_rows",
            environment={"LOG_ROWS": str(log)},
        )  # fmt: skip
        shares = []
        for rank in range(size):
            file = log.with_suffix(f".{rank}")
            shares.append([row for line in file.read_text().splitlines() for row in json.loads(line)])
            file.unlink()
        counted = Counter(itertools.chain(*shares))
        assert counted == dict.fromkeys(range(1, rows + 1), 2)
        assert min(map(len, shares)) > rows * 2 / size * 0.8  # and the shares are fair
