"""``llamatune train`` as a job: killed, stopped, run again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import assert_same_outcome, files, make_spec, metrics, spec_values
from safetensors.torch import load_file, save_file

from llamatune.training.train import train

Command = Callable[..., Any]
LONG = {"training__max_steps": 120, "training__save_every_steps": 3, "evaluation__every_steps": 25}


@pytest.fixture
def spec_file(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        data = prepared(validation_fraction=0.25, seed=3)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(spec_values(tiny_base(), data, tmp_path / "run", **changes)))
        return path

    return write


def _start(spec: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llamatune", "train", str(spec), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the run's log tells of a step; the process must live that long."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.002)
    pytest.fail(f"never came to step {step}: {process.communicate()}")


def test_killed_terminated_and_run_again_gives_the_bytes_of_one_go(
    command: Command,
    spec_file: Callable[..., Path],
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """SIGKILL, then SIGTERM, then to the end, then once more: one result."""
    spec, run = spec_file(**LONG), tmp_path / "run"
    process = _start(spec)
    _wait_for_step(process, run, 8)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "adapter").exists()

    process = _start(spec)
    _wait_for_step(process, run, 30)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (75, "")
    assert stderr.splitlines()[-1].startswith("error: stopped by a signal after step ")
    assert "run the same command again" in stderr
    saved = max((run / "checkpoints").iterdir()).name
    assert f"saved step={int(saved[5:])} " in stderr
    assert int(saved[5:]) == metrics(run, "step")[-1]["step"], "the checkpoint is of the last step that was made"

    process = _start(spec)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert f"resumed_step={int(saved[5:])}" in stderr
    assert json.loads(stdout) == json.loads((run / "summary.json").read_text())
    train(make_spec(tiny_base(), prepared(validation_fraction=0.25, seed=3), tmp_path / "whole", **LONG))
    assert_same_outcome(run, tmp_path / "whole")

    before = files(run)
    again = command("train", spec, "--json")
    assert (again.code, again.stdout) == (0, stdout)
    assert files(run) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_every_signal_of_a_scheduler_saves_and_exits_75(
    command: Command, spec_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Sent from inside the run, after its third step."""
    from llamatune.events import Step
    from llamatune.formats.metrics import MetricsLog, Record

    append = MetricsLog.append

    def signalling(self: MetricsLog, record: Record) -> None:
        append(self, record)
        if isinstance(record, Step) and record.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "append", signalling)
    before = signal.getsignal(number)
    outcome = command("train", spec_file(**LONG), "--json")
    assert (outcome.code, outcome.stdout) == (75, "")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert signal.getsignal(number) == before


def test_overrides_resume_and_refusals_have_their_exit_codes(
    command: Command, spec_file: Callable[..., Path], tmp_path: Path
) -> None:
    spec = spec_file()
    assert command("train", spec, "training.seed=7", "--json").code == 0
    assert "seed: 7" in (tmp_path / "run" / "spec.yaml").read_text()
    changed = command("train", spec, "training.seed=8")
    assert changed.code == 2
    assert "training.seed: 7 -> 8" in changed.stderr
    assert changed.stderr.count("\n") == 1
    never = command("train", spec, "training.seed=7", "--resume", "never")
    assert never.code == 5
    assert command("train", spec, "training.seed=7", "training.num_epochs=2", "--json").code == 0
    assert command("train", spec, "training.learnig_rate=1", "--json").code == 2


def test_a_loss_that_is_not_finite_is_exit_code_6(
    command: Command, spec_file: Callable[..., Path], tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    """From a NaN in the base: which step an update of an absurd rate overflows at depends on the processor."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base(), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][1, 3] = float("nan")  # of BOS, which every row has
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    outcome = command("train", spec_file(), f"model.path={broken}", "--json")
    assert (outcome.code, outcome.stdout) == (6, "")
    assert "the validation loss is not finite at step 1, among validation rows" in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_log_that_is_no_terminal_has_one_line_a_report(command: Command, spec_file: Callable[..., Path]) -> None:
    outcome = command("train", spec_file(training__num_epochs=2, training__log_every_steps=1), "--json")
    times, lines = zip(*(line.split(" ", 1) for line in outcome.stderr.splitlines()), strict=True)
    assert list(times) == sorted(times)
    assert all(0 <= time.time() - time.mktime(time.strptime(at, "%Y-%m-%dT%H:%M:%S")) < 600 for at in times)
    steps = [line for line in lines if line.startswith("train ")]
    assert [line.split(" loss=")[0] for line in steps] == [
        f"train epoch={epoch}/2 step={3 * (epoch - 1) + step}/6" for epoch in (1, 2) for step in (1, 2, 3)
    ]
    assert [bool(re.search(r" left=\d+:\d\d:\d\d$", line)) for line in steps] == [False, *[True] * 5]
    assert steps[-1].endswith(" left=0:00:00")
    assert "\x1b" not in outcome.stderr
    assert sum(line.startswith("eval step=") for line in lines) == 3


def test_a_dry_run_trains_nothing(command: Command, spec_file: Callable[..., Path], tmp_path: Path) -> None:
    outcome = command("train", spec_file(), "--dry-run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["total_steps"] == 3
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    refused = command("train", spec_file(), "--dry-run")
    assert (refused.code, "pass --overwrite" in refused.stderr) == (5, True)
    assert command("train", spec_file(), "--dry-run", "--overwrite").code == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_the_table_at_the_end_tells_what_was_trained(command: Command, spec_file: Callable[..., Path]) -> None:
    outcome = command("train", spec_file())
    assert outcome.code == 0
    for shown in ("runtime", "tokens/s", "peak memory, cpu", "trainable parameters", "perplexity"):
        assert shown in outcome.stdout


def test_no_run_loads_torchs_compiler(
    spec_file: Callable[..., Path], tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """It takes as long to load as torch itself; torch.optim and torch.nn.init on meta tensors would."""
    kinds: list[dict[str, Any]] = [
        {"evaluation__every_steps": 1, "training__precision": "bf16", "model__dtype": "bfloat16"},
        {"training__optimizer": "sgd", "training__momentum": 0.5},
        {"training__optimizer": "adamw_8bit", "model__dtype": "nf4"},
        {"training__precision": "fp16", "model__init": "random"},
        {"lora": None},
    ]
    specs = []
    for number, changes in enumerate(kinds):
        path = spec_file(training__max_steps=2, training__output_dir=str(tmp_path / f"run-{number}"), **changes)
        specs.append(str(path.rename(tmp_path / f"spec-{number}.yaml")))
    code = """
import contextlib, sys
from llamatune.cli import main
for spec in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main(["train", spec, "--json"])
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *specs], capture_output=True, text=True, check=True)
    *summaries, loaded = done.stdout.splitlines()
    assert [json.loads(line)["steps"] for line in summaries] == [2] * len(kinds), done.stderr
    assert "torch.optim" in loaded.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(loaded.split())
