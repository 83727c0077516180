"""Closed streams, early signals, odd locales: the exit code holds and there is never a traceback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.demo.run_demo import MATERIAL

LLAMATUNE = f"{sys.executable} -m llamatune"
GENERATE = f"{LLAMATUNE} generate --model {MATERIAL / 'base'} --template none --temperature 0 --max-new-tokens 3"


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"{LLAMATUNE} count-params --preset llama-2-7b >&-", 0),
        (f"{LLAMATUNE} count-params --preset llama-2-7b --json >&-", 0),
        (f"{LLAMATUNE} count-params --preset llama-2-7b 2>&-", 0),
        (f"{LLAMATUNE} train absent.yaml 2>&-", 2),
        (f"{LLAMATUNE} train absent.yaml 2>/dev/full", 2),
        (f"{GENERATE} --prompt Belby >&- 2>&-", 0),
        (f"{GENERATE} <&-", 2),
        (f"printf '\\xff' | {GENERATE}", 3),
        (f"{GENERATE} </dev/zero", 3),
        (f"{GENERATE} --prompt x --device tpu", 2),
        (f"{GENERATE} --prompt x --output absent/file.jsonl", 5),
        (f"{GENERATE} --prompt x --output .", 5),
        (f"mkfifo pipe; {GENERATE} --prompt x --output pipe", 5),
    ],
)
def test_the_exit_code_holds_and_there_is_no_traceback(command: str, code: int, tmp_path: Path) -> None:
    done = shell(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") <= 1


def test_training_goes_on_without_stderr(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {MATERIAL / 'base'}, dtype: float32}}\nlora: {{r: 2}}\ndata: {{train: prepared}}\n"
        "training: {output_dir: run, max_steps: 2, precision: fp32}\n"
    )
    rows, tokenizer = MATERIAL / "held_out.jsonl", MATERIAL / "base" / "tokenizer.model"
    prepare = f"{LLAMATUNE} prepare-data {rows} --tokenizer {tokenizer} --output prepared --limit 20"
    assert shell(f"{prepare} >&- 2>&-", tmp_path).returncode == 0
    assert shell(f"{LLAMATUNE} train run.yaml 2>&- | true", tmp_path).returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_c_locale_takes_utf8_prompts_and_overrides(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = shell(f"{GENERATE} --prompt 'Élan 日本' --json", tmp_path, **locale)
    assert said.returncode == 0, said.stderr
    (tmp_path / "run.yaml").write_text("model: {path: x}\nlora: {}\ndata: {train: p}\ntraining: {output_dir: r}\n")
    refused = shell(f"{LLAMATUNE} train run.yaml 'data.train=prépa 日'", tmp_path, **locale)
    assert refused.returncode == 3
    assert "no such directory" in refused.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGUSR1, 130)])
def test_a_signal_while_libraries_load_is_one_line(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*GENERATE.split()[:-1], "400", "--prompt", "x"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_what_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    command = f"trap '' HUP; {GENERATE} --prompt Belby & child=$!; sleep 1; kill -HUP $child; wait $child"
    assert shell(command, tmp_path).returncode == 0


PRESET = f"{LLAMATUNE} count-params --preset llama-2-7b".split()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def signalled(number: int, after_s: float, cwd: Path) -> tuple[int, str, str]:
    """A short command that gets a signal so long after Python began to run the entry point."""
    code = (
        "import os, sys, threading, time\n"
        f"timer = threading.Timer({after_s}, os.kill, (os.getpid(), {int(number)}))\n"
        "timer.daemon = True\n"
        "from llamatune.__main__ import main\n"
        "timer.start()\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *PRESET[3:]], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def assert_whole(outcome: tuple[int, str, str]) -> None:
    """Either the whole result and 0, or one line and the code of a stop."""
    code, out, err = outcome
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    if code == 0:
        assert "llama" in out or "base" in out
        assert "error" not in err
    else:
        assert (code, out, err.count("error:"), err.count("\n")) == (130, "", 1, 1)


@pytest.mark.parametrize(("number", "after_s"), list(zip(SIGNALS, (0.0, 0.02, 0.06, 0.1, 0.2), strict=True)))
def test_a_signal_at_any_moment_ends_in_one_line_or_in_the_result(number: int, after_s: float, tmp_path: Path) -> None:
    assert_whole(signalled(number, after_s, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_the_moment_of_a_signal_swept(number: int, tmp_path: Path) -> None:
    for place in range(60):
        assert_whole(signalled(number, place * 0.01, tmp_path))


NAMED = """
class Named:
    def __set_name__(self, owner, name): stop()
class Owner:
    named = Named()
"""
WRAPPED = """
try: stop()
except BaseException as fault: raise ImportError("broken") from fault
"""
HIDDEN = """
try: stop()
except BaseException: raise ValueError("broken") from None
"""


@pytest.mark.parametrize("module", [NAMED, WRAPPED, HIDDEN])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_an_import_turns_into_another_fault_is_one_line(number: int, module: str, tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from llamatune import cli\n"
        f"def stop():\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(5)\n"
        f"cli._load_verb = lambda name: exec({module!r}, {{'stop': stop}})\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *PRESET[3:]], cwd=tmp_path, capture_output=True, text=True)
    assert_whole((done.returncode, done.stdout, done.stderr))
    assert done.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_exit_changes_nothing(number: int, tmp_path: Path) -> None:
    """After the result: the exit functions run, and Python has taken away handlers that are its own functions."""
    code = (
        "import atexit, os, sys\n"
        f"class Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {int(number)})\n"
        f"atexit.register(os.kill, os.getpid(), {int(number)})\n"
        "sys.last_of_all = Last()\n"
        "from llamatune.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *PRESET[3:]], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "code"),
    [
        ("MPLBACKEND=bogus", 0), ("COLUMNS=abc", 0), ("LINES=abc", 0), ("TERM=bogus", 0), ("PYTHONIOENCODING=ascii", 0),
        ("HOME=absent", 0), ("TMPDIR=absent", 0), ("OMP_NUM_THREADS=abc", 0), ("TORCH_LOGS=bogus", 5),
    ],
)  # fmt: skip
def test_a_wrong_variable_of_a_library_is_no_traceback(variable: str, code: int, tmp_path: Path) -> None:
    words = "from llamatune.reporting.chart_images import require_matplotlib as r; r(); "
    program = words + "import torch" if code == 0 else ""
    command = f"{sys.executable} -c '{program}'" if program else f"{GENERATE} --prompt Belby"
    done = shell(f"{variable} {command}", tmp_path)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("flags", ["", "--json"])
def test_a_full_disk_under_the_result_names_standard_output(flags: str, tmp_path: Path) -> None:
    done = shell(f"{LLAMATUNE} count-params --preset llama-2-7b {flags} >/dev/full", tmp_path)
    assert done.returncode == 5
    assert done.stderr == "error: cannot write: No space left on device: standard output: free some space\n"


CHAT = f"printf 'hello\\n' | {LLAMATUNE} chat --model {MATERIAL / 'base'} --template alpaca --max-new-tokens 2"
CANNOT_WRITE = "error: cannot write: {}: standard output: {}\n"


@pytest.mark.parametrize("redirected", [">&-", "1</dev/null", ">/dev/full", "| true; exit ${PIPESTATUS[-2]}"])
@pytest.mark.parametrize(
    "command",
    [f"{LLAMATUNE} explain 4", f"{LLAMATUNE} docs judge", LLAMATUNE, f"{LLAMATUNE} train --help", CHAT],
    ids=["explain", "docs", "no verb", "help", "chat"],
)
def test_whatever_prints_treats_its_stdout_alike(command: str, redirected: str, tmp_path: Path) -> None:
    """Closed, or a pipe whose reader has left: nobody wants the result. Else a write that fails is a fault."""
    done = shell(f"{command} {redirected}", tmp_path)
    told = {
        "1</dev/null": CANNOT_WRITE.format("Bad file descriptor", "redirect it to what can be written"),
        ">/dev/full": CANNOT_WRITE.format("No space left on device", "free some space"),
    }.get(redirected, "")
    errors = "".join(line for line in done.stderr.splitlines(keepends=True) if " warning: " not in line)
    assert (done.returncode, errors) == (5 if told else 0, told)


@pytest.mark.parametrize("key", ["model.path", "data.train", "training.output_dir", "lora.init_from"])
def test_a_nul_in_a_path_of_the_spec_is_refused(key: str, tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: x}\nlora: {}\ndata: {train: p}\ntraining: {output_dir: r}\n")
    done = command("train", tmp_path / "run.yaml", f'{key}="a\\0b"')
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "a path holds no NUL character" in done.stderr
    assert key in done.stderr
