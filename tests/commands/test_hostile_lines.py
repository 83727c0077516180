"""Random command lines with odd arguments: a documented exit code, one line of an error, no control character."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow

from llamatune.demo.run_demo import MATERIAL

LINES = {
    "judge": (["run"], "--gsm8k --choices --general --require --per-question --plot --limit --device --seed"),
    "sweep": (["run.yaml", "--grid", "lora.r=1,2"], "--grid --output --at-once --force-base"),
    "init": (["--model", "base", "--data", "rows.jsonl"], "--model --data --memory --gpu --output"),
    "schema": ([], "--output"),
    "explain": ([], "--json"),
    "docs": ([], "--json"),
    "report": (["run", "--output", "out.html"], "--tables --charts --output --evaluation --benchmark --rows --prompt"),
    "chat": (["--model", "base", "--template", "alpaca", "--max-new-tokens", "2"],
             "--model --adapter --template --system --temperature --max-new-tokens --seed --device"),
}  # fmt: skip
ODD = (
    *(
        "",
        "\x1b[31mred",
        "a\nb",
        "\u202eabc",
        "\x07",
        "-",
        "--",
        "0",
        "-1",
        "9" * 30,
        "1e999",
        "nan",
        "[/bold]",
        "a" * 5000,
    ),
    *("fifo", "empty", "loop", "bytes", "run", "run.yaml", "/dev/null", "/dev/zero", "~nobody", "$UNSET", "rows.jsonl"),
    *(
        "\u00e9",
        "{}",
        "=",
        "x=y",
        "null",
        "lora.r=x",
        "lora.r=1,2",
        "model.path=y",
        "task_loss<1",
        "24GiB",
        "t4",
        "cpu",
    ),
)
INPUTS = ("", "hi \x1b[2J\n", "/params x\n", "/save fifo\n/save\n", '"""\nopen')


def drawn(chance: random.Random) -> list[str]:
    verb = chance.choice(sorted(LINES))
    usual, flags = LINES[verb]
    words = [verb, *(usual if chance.random() < 0.75 else [])]
    for _ in range(chance.randrange(4)):
        option = chance.choice(flags.split()) if chance.random() < 0.7 else ""
        value = chance.choice(ODD)
        words += [word for word in (option, value) if word or not option]
    return words


@pytest.fixture
def odd_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("loop").symlink_to("loop")
    Path("bytes").write_bytes(bytes(range(256)))
    Path("base").symlink_to(MATERIAL / "base")
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    Path("run.yaml").write_text("model: {path: base}\nlora: {}\ndata: {train: p}\ntraining: {output_dir: r}\n")
    return tmp_path


def faults_of(words: list[str], done: Any) -> list[str]:
    found = [f"exit code {done.code}"] if done.code not in (0, 2, 3, 4, 5, 6, 75, 130) else []
    errors = [line for line in done.stderr.split("\n") if line.startswith("error: ")]
    if done.code and done.code != 75 and (len(errors) != 1 or not done.stderr.endswith(f"{errors[-1]}\n")):
        found.append("not one line of an error at the end")
    if "Traceback" in done.stderr:
        found.append("a traceback")
    for name in ("stdout", "stderr"):
        obeyed = [letter for letter in getattr(done, name) if not letter.isprintable() and letter not in "\n\t"]
        found += [f"{obeyed[0]!a} on {name}"] if obeyed else []
    return found


@pytest.mark.parametrize("seed", [0, *(slow(seed) for seed in range(1, 10))])
def test_no_command_line_ends_otherwise_than_documented(
    odd_place: Path, command: Callable[..., Any], seed: int, tell: Callable[[str], None]
) -> None:
    chance, bad, codes = random.Random(seed), [], []
    for _ in range(100):
        words, stdin = drawn(chance), chance.choice(INPUTS)
        done = command(*words, stdin=stdin)
        codes.append(done.code)
        bad += [f"{fault}: {words!a}: {done.stderr[-300:]!a}" for fault in faults_of(words, done)]
    tell(f"exit codes { ({code: codes.count(code) for code in sorted(set(codes))}) }")
    assert not bad, "\n".join(bad)
    assert len(set(codes)) > 2
