"""The benchmarks run, at a size that says nothing about speed: the same model on both sides, the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamatune.demo.run_demo import MATERIAL

ROOT = Path(__file__).parents[1]


def run_benchmark(output: Path, *arguments: str) -> dict[str, Any]:
    rows, tokenizer = MATERIAL / "instructions.jsonl", MATERIAL / "base" / "tokenizer.model"
    command = [sys.executable, str(ROOT / "benchmarks" / "against_peft.py"), "--rows", str(rows), "--tokenizer",
               str(tokenizer), "--output", str(output), "--limit", "20", "--rounds", "1", *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((output / "table.json").read_text())
    assert (output / "table.md").read_text().count("\n| ") == len(table["rows"]) + 1
    return {row["name"]: row for row in table["rows"]}


@pytest.mark.parametrize("targets", ["qv", "all"])
def test_one_epoch_end_to_end_has_the_peers_losses(tmp_path: Path, targets: str) -> None:
    settings = "Trainer, batch 8;Trainer, batch 1 x 8"
    rows = run_benchmark(
        tmp_path, "--end-to-end", "--shape", "tiny", "--dtype", "fp32", "--targets", targets, "--settings", settings
    )
    for name in settings.split(";"):
        assert rows[f"epoch, tokens/s, {name}"]["largest_loss_difference"] < 1e-4


def test_the_time_to_the_first_update_is_seen_from_outside(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path, "--first-step", "--first-step-rounds", "1")
    assert len(rows) == 2
    assert all(row["llamatune"] > 0 and row["peer"] > 0 for row in rows.values())
