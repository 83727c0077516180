"""README's job from its first command to its last, on the tiny model that ships, every line of stderr looked at."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MATERIAL = ROOT / "llamatune" / "demo"
README = (ROOT / "README.md").read_text(encoding="utf-8")

_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d (?:info: .+|\$ llamatune .+|[a-z]+(?: \w+=\S+)+)")
"""All that a verb writes to stderr where nothing is wrong: notices, commands and lines of ``key=value``, each after
its time."""


def unexpected_lines(stderr: str) -> list[str]:
    """What neither informs nor has the form of ``key=value``: warnings, of whoever, errors, and stray output."""
    return [line for line in stderr.splitlines() if not _LINE.fullmatch(line)]


OTHER_VERBS = {
    "chat": "chat --model models/llama-2-7b --template llama2-chat --temperature 0 --max-new-tokens 8",
    "slurm": "slurm run.yaml --output job.sh",
    "demo": "demo --output demo-output",
}
"""A command of each verb that README's job does without, to be run after it."""


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language (``""``: of none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[list[str]]:
    """README's commands in their order, each split into words."""
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line]


def other_commands() -> list[list[str]]:
    """Those of ``OTHER_VERBS``, split into words."""
    return [["llamatune", *shlex.split(words)] for words in OTHER_VERBS.values()]


def make_workplace(place: Path) -> None:
    """What README's user has: a model (a tiny one here), rows, and README's spec."""
    (place / "models").mkdir()
    (place / "models" / "llama-2-7b").symlink_to(MATERIAL / "base")
    rows = (MATERIAL / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (place / "alpaca_data.json").write_text(f"[{','.join(rows)}]", encoding="utf-8")
    (place / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")


def run_quietly(command: Sequence[str], place: Path, **environment: str) -> str:
    """Run a verb that has nothing to warn of, with a question as its standard input; its standard output.

    Raises:
        AssertionError: it failed, or wrote an unexpected line to stderr.
    """
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, **environment},
        input="Which river runs through Marby?\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    stray = unexpected_lines(done.stderr)
    assert not stray, f"{shlex.join(command)} wrote to stderr: {stray}"
    return done.stdout
