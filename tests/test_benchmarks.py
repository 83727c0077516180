"""The benchmarks run, at a size that says nothing about speed: the same model on both sides, the same losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from learning_rates import PAIRS, RATES, rows_of, table
from slow_cases import slow

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


@pytest.mark.parametrize("targets", ["qv", slow("all")])
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


def run_pieces(output: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the measurements that are there, as lines."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--shape", "tiny", "--output",
               str(output), "--dense-rounds", "1", "--dtype", "fp32", *arguments]  # fmt: skip
    code = subprocess.run(command, capture_output=True, check=False).returncode
    return code, [line for path in sorted(output.glob("*/measured.jsonl")) for line in path.read_text().splitlines()]


def test_a_piece_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    piece = ("--pieces", "8b")
    assert run_pieces(tmp_path, *piece, "--minutes", "0") == (1, [])
    code, lines = run_pieces(tmp_path, *piece)
    assert code == 0
    (line,) = map(json.loads, lines)
    counts, losses = line["result"]["trainable_parameters"], line["result"]["losses"]
    assert counts["llamatune"] == counts["trainer"]
    assert losses["llamatune"] == pytest.approx(losses["trainer"], abs=1e-4), "one base and one adapter on both sides"
    shutil.rmtree(tmp_path / "8b")
    assert run_pieces(tmp_path, *piece, "--minutes", "0") == (0, lines), "from its tar, and without a measurement"
    table = json.loads((tmp_path / "8b" / "table.json").read_text())
    assert len(table["rows"]) == 1
    assert table["rows"][0]["name"].startswith("dense, tokens/s, 2 x 4096 all")


def test_every_piece_has_measurements() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--list"], capture_output=True, text=True, check=True
    )
    pieces = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(pieces) == 11
    assert max(pieces.values()) <= 8


def test_a_merge_is_timed_beside_a_copy(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "merging.py"), str(tmp_path / "scratch"), "--layers", "1",
               "--hidden", "128", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split("  ")[1].strip() for line in lines[1:]] == ["cp and sync", "llamatune", "starting it"]
    assert not list((tmp_path / "scratch").iterdir())


def test_preparation_is_timed_with_every_number_of_workers() -> None:
    rows, tokenizer = MATERIAL / "instructions.jsonl", MATERIAL / "base" / "tokenizer.model"
    command = [sys.executable, str(ROOT / "benchmarks" / "preparing.py"), "--tokenizer", str(tokenizer), "--source",
               str(rows), "--rows", "20", "--rounds", "1", "--workers", "1", "--peer", "false"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "datasets is not installed: llamatune alone\n20 rows, " in done.stdout
    assert "1 llamatune    1 workers: " in done.stdout


def test_the_table_of_learning_rates_has_the_regret(tmp_path: Path) -> None:
    """A tenth above the lowest loss of the sweep; a pair that is not trained at all rates yet is left out."""
    losses = dict(zip(map(str, RATES), (4.0, 3.5, 3.0, 2.0, 2.5, 3.0, None), strict=True))
    results: dict[str, Any] = {rate: {"steps": 9, "loss": loss} for rate, loss in losses.items()}
    (tmp_path / "1.json").write_text(json.dumps(results))
    results["auto"] = {"steps": 9, "loss": 2.2, "search": {"learning_rate": 8.5e-4}}
    (tmp_path / "0.json").write_text(json.dumps(results))
    lines = table(tmp_path).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:2] == [next(iter(PAIRS)), "9"]
    assert cells[5] == "**2.0000**"
    assert cells[8:] == ["diverged", "0.00085", "2.2000", "+10.0 %"]


ROWS_OF_THE_TABLE = {
    "alpaca": "56df6a229b291a7f",
    "gsm8k": "1fa75de2f1b781f6",
    "prose": "23e51024974178a6",
    "demo": "437d69df0f2e493f",
    "demo-90": "430118d12e1f0620",
}
"""Digests of the rows that docs/learning-rate.md was measured on."""


@pytest.mark.parametrize("name", ROWS_OF_THE_TABLE)
def test_the_rates_were_measured_on_these_rows(name: str, request: pytest.FixtureRequest) -> None:
    fixtures = request.getfixturevalue("shared_fixtures") if name in ("alpaca", "gsm8k") else Path("none")
    digest = sha256(json.dumps(rows_of(name, fixtures)).encode()).hexdigest()[:16]
    assert digest == ROWS_OF_THE_TABLE[name], "other rows: measure the pairs of docs/learning-rate.md on them again"
