"""``llamatune prepare-data`` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prepared_rows import alpaca

_RUN = """
import sys, typer
from llamatune.commands._typer_options import with_options
from llamatune.commands.prepare_data import prepare_data
from llamatune.errors import LlamatuneError
app = typer.Typer()
app.command("prepare-data")(with_options(prepare_data))
try:
    app(sys.argv[1:], standalone_mode=False)
except LlamatuneError as fault:
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(fault.exit_code)
finally:
    heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
    assert not heavy, heavy
"""


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", _RUN, *map(str, arguments)]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def rows(write_rows: Callable[..., Path]) -> Path:
    return write_rows([alpaca(n, output=f"\x1b[31mred {n}") for n in range(12)])


def test_the_report_and_the_preview(rows: Path, tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    done = _run(
        rows, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out", "--preview", 1, "--show-ids"
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout, "neither colours nor the row's own escapes"
    assert "«<s>»(1)" in done.stdout
    assert "«</s>»(2) ]]" in done.stdout
    shown = done.stdout[: done.stdout.index("alpaca rows")].splitlines()
    assert [line.split()[0] for line in shown if re.match("  [^ ]", line)] == ["instruction", "output", "as", "tokens"]
    assert re.search(r"^  output       \\x1b\[31mred 0$", done.stdout, re.MULTILINE)
    assert "[[\\x1b[31mred 0«</s>»]]" in done.stdout
    assert "12" in done.stdout
    again = _run(rows, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out")
    assert "left as it is" in again.stdout


def test_the_longest_rows_of_a_list_are_named_by_their_number(
    tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([alpaca(n, output="stone " * n) for n in range(1, 9)]))
    done = _run(rows, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out")
    shown = " ".join(done.stdout.replace(str(tmp_path), "").split())
    assert "row 8)" in shown, done.stdout
    assert "rows.json:1)" not in shown


def test_json_is_one_object_with_the_promised_keys(
    rows: Path, tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    done = _run(
        rows, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out", "--json", "--preview", 1,
        "--validation-fraction", 0.25,
    )  # fmt: skip
    payload = json.loads(done.stdout)
    promised = "output rows_in kept truncated dropped refused train_rows validation_rows tokens target_tokens"
    assert set(promised.split()) <= set(payload)
    assert payload["rows_in"] == payload["kept"] + payload["dropped"] + payload["refused"] == 12
    assert (payload["train_rows"], payload["validation_rows"]) == (9, 3)
    assert payload["preview"][0]["tokens"][0] == {"id": 1, "piece": "<s>", "trained": False, "special": True}


def test_columns_are_mapped_on_the_command_line(
    write_rows: Callable[..., Path], tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    path = write_rows([{"query": "three apples", "gold": "seven", "User": "x"}])
    arguments = (path, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out", "--json")
    assert json.loads(_run(*arguments, "--map", "instruction=query,output=gold").stdout)["adjusted"] == {}
    done = _run(*arguments, "--map", "instruction=query,outptu=gold", "--overwrite")
    assert done.returncode == 2
    assert "there is no field 'outptu': --map: fields: instruction, input, output" in done.stderr


def test_an_error_is_one_line_and_stdout_stays_empty(
    rows: Path, tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    with rows.open("a") as file:
        file.write('{"instruction": "\x1b[31m"}\n')
    done = _run(rows, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out", "--json")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"error: {rows}:13: " in done.stderr
    assert "\x1b" not in done.stderr


def test_a_signal_ends_it_with_75_and_leaves_nothing(
    tokenizer_models: dict[str, Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows([alpaca(n, output="three apples " * 50) for n in range(60_000)])
    arguments = (path, "--tokenizer", tokenizer_models["bpe"], "--output", tmp_path / "out")
    child = subprocess.Popen(
        _command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".llamatune-tmp-*-out/train.spool")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGTERM)  # as Slurm does: to every process of the step
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 75, stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
