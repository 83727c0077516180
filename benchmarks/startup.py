"""Times ``--help``, compared with a bare Typer app of two verbs, alternating: ``python benchmarks/startup.py``.

Prints processor seconds (user + system) of whole processes and the ratio of medians, for the list of verbs and for the
page of each verb. The target is a ratio below 2.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 9
VERBS = ("", "prepare-data", "train", "merge-lora", "generate", "count-params", "demo", "env")
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(number: int = 1) -> None:
    "One verb."
@app.command()
def two(number: int = 1) -> None:
    "Another."
app()
"""


def processor_seconds(command: list[str]) -> float:
    """User and system time of one run; its output is discarded."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure every verb's help and print one line each."""
    with tempfile.TemporaryDirectory() as scratch:
        bare = Path(scratch) / "bare.py"
        bare.write_text(BARE, encoding="utf-8")
        for verb in VERBS:
            ours = [sys.executable, "-m", "llamatune", *([verb] if verb else []), "--help"]
            bare_app = [sys.executable, str(bare), *(["one"] if verb else []), "--help"]
            pairs = [(processor_seconds(ours), processor_seconds(bare_app)) for _ in range(RUNS)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            sys.stdout.write(
                f"{verb or 'llamatune':14} {mine:.3f} s  bare Typer {theirs:.3f} s  ratio {mine / theirs:.2f}\n"
            )


if __name__ == "__main__":
    main()
