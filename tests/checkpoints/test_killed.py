"""Killed without warning (out of memory, a job's time limit), a verb that writes leaves nothing that could deceive."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

SWEEP = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path

arguments, output, stride = json.loads(sys.argv[1])
output = Path(output)
parent = os.fsencode(output.parent)
from llamatune.cli import main
import llamatune.checkpoints.merging, llamatune.data.prepare  # a child need not import them again

def touches(event, values):
    '''Whether a call changes what lies beside the output: opens to write, makes, renames or removes.'''
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
        return False
    if event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    return isinstance(values[0], (str, bytes)) and os.fsencode(values[0]).startswith(parent)

def run(kill_at):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, values):
            nonlocal seen
            if touches(event, values):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sync = os.fsync
        def fsync(descriptor):
            hook("os.remove", (parent,))
            sync(descriptor)
            hook("os.remove", (parent,))
        os.fsync = fsync
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code or 0)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)

def tree():
    return {p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(output.rglob("*")) if p.is_file()} if output.exists() else None

kill_at = 1
while True:
    code = run(kill_at)
    after_kill = tree()
    again = run(0)
    print(json.dumps([kill_at, code, after_kill, again, tree(), sorted(map(os.fsdecode, os.listdir(parent)))]))
    sys.stdout.flush()
    if code != -signal.SIGKILL:
        break
    shutil.rmtree(output)
    kill_at += stride
"""


STRIDES = [4, pytest.param(1, marks=pytest.mark.slow)]


def swept(arguments, output, stride):
    """Per moment: ``[moment, exit code, product after the kill, exit code of the rerun, product, names beside it]``."""
    task = json.dumps([[str(a) for a in arguments], str(output), stride])
    done = subprocess.run([sys.executable, "-c", SWEEP, task], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_nothing_deceives(moments, name):
    *killed, (_, code, finished, _, _, _) = moments
    assert code == 0
    assert "llamatune.json" in finished
    assert len(killed) >= 5
    for moment, code, product, again, complete, names in killed:
        assert code == -signal.SIGKILL, moment
        assert product in (None, finished), f"killed at {moment}: half a product"
        assert again == 0, moment
        assert complete == finished, moment
        assert names == [name], f"killed at {moment}: left behind"
    assert None in [product for _, _, product, _, _, _ in killed]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("format_", ["hf", "meta"])
def test_merge_lora_killed_at_any_moment(tiny, tiny_adapter, tmp_path, format_, stride):
    parent = tmp_path / "products"
    parent.mkdir()
    arguments = ("merge-lora", "--model", tiny[0], "--adapter", tiny_adapter, "--output", parent / "out")
    assert_nothing_deceives(swept((*arguments, "--format", format_, "--json"), parent / "out", stride), "out")


@pytest.mark.parametrize("stride", STRIDES)
def test_prepare_data_killed_at_any_moment(tiny_rows, tiny_tokenizer, tmp_path, stride):
    parent = tmp_path / "products"
    parent.mkdir()
    arguments = ("prepare-data", tiny_rows, "--tokenizer", tiny_tokenizer, "--output", parent / "out")
    more = ("--skip-bad-rows", 99, "--validation-fraction", 0.2, "--json")
    assert_nothing_deceives(swept((*arguments, *more), parent / "out", stride), "out")


@pytest.mark.parametrize("verb", ["merge-lora", "prepare-data"])
def test_a_real_process_killed_at_several_times(tiny, tiny_adapter, tiny_rows, tiny_tokenizer, tmp_path, verb):
    """From the outside, workers and all, wherever the clock finds it."""
    parent = tmp_path / "products"
    parent.mkdir()
    if verb == "merge-lora":
        arguments = ["--model", tiny[0], "--adapter", tiny_adapter]
    else:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": "x" * 200}) + "\n" for n in range(20_000)))
        arguments = [rows, "--tokenizer", tiny_tokenizer]
    command = [sys.executable, "-m", "llamatune", verb, *map(str, arguments), "--output", str(parent / "out")]

    def tree():
        files = [p for p in sorted((parent / "out").rglob("*")) if p.is_file()]
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    started = time.monotonic()
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    whole_s, finished = time.monotonic() - started, tree()
    for share in (0.6, 0.9):
        for path in (parent / "out").iterdir():
            path.unlink()
        (parent / "out").rmdir()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(share * whole_s)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(timeout=60)
        assert tree() in ({}, finished)
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
        assert tree() == finished
        assert [p.name for p in parent.iterdir()] == ["out"]
