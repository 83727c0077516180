"""The batch script of the README: the one in examples/, and what it does with each exit code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train.sbatch"


TRAINED = "srun --ntasks=1 llamatune train run.yaml"
REQUEUED = "scontrol requeue 17"
RunScript = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run the script beside an ``srun`` and a ``scontrol`` that note how they were called: exit code and notes."""
    notes = tmp_path / "notes"
    for name in ("srun", "scontrol"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >> "$NOTES"\nexit "${name.upper()}_CODE"\n', encoding="utf-8")
        tool.chmod(0o755)

    def run(code: int, *options: str, scontrol: int = 0, restarts: str | None = None) -> tuple[int, list[str]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "SLURM_JOB_ID": "17"}
        environment |= {"SRUN_CODE": str(code), "SCONTROL_CODE": str(scontrol)}
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = restarts
        done = subprocess.run(["bash", *options, SCRIPT], env=environment, check=False)
        return done.returncode, notes.read_text(encoding="utf-8").splitlines()

    return run


@pytest.mark.parametrize("options", [[], ["-e"], ["-eu", "-o", "pipefail"]], ids=["plain", "e", "eu"])
@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130, 137, 138, 143])
def test_only_a_stop_is_requeued_and_the_exit_code_is_the_runs(
    run_script: RunScript, code: int, options: list[str]
) -> None:
    assert run_script(code, *options) == (code, [TRAINED, REQUEUED] if code == 75 else [TRAINED])


@pytest.mark.parametrize(("restarts", "again"), [("1", True), ("99", True), ("100", False), ("2000", False)])
def test_requeues_come_to_an_end(run_script: RunScript, restarts: str, again: bool) -> None:
    assert run_script(75, restarts=restarts) == (75, [TRAINED, REQUEUED] if again else [TRAINED])


@pytest.mark.parametrize("options", [[], ["-eu"]], ids=["plain", "eu"])
def test_a_requeue_that_is_refused_leaves_a_job_that_failed(run_script: RunScript, options: list[str]) -> None:
    assert run_script(75, *options, scontrol=1) == (75, [TRAINED, REQUEUED])


def test_the_readme_shows_the_script() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```sh\n{SCRIPT.read_text(encoding='utf-8')}```\n" in readme
    assert "exec srun" not in readme


def test_what_slurm_is_asked_for() -> None:
    """Slurm reads options above the first command alone, and USR1 without ``B:`` goes to the step."""
    head, _, commands = SCRIPT.read_text(encoding="utf-8").partition("\n\n")
    options = [line.removeprefix("#SBATCH ") for line in head.splitlines()[1:]]
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(re.fullmatch(r"--signal=USR1@\d+", option) for option in options)
    assert all(option.startswith("--") and " " not in option for option in options)
    assert "#SBATCH" not in commands
